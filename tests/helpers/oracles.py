"""Slow and obviously right: every definition once more, one sample and one number at a time.

Gradients come from ``torch.autograd.grad`` on batches of one. The metrics are written from the
equations in the documentation, on plain Python floats, without calling the library.
"""

import copy
import math

import torch

# --- gradients ---------------------------------------------------------------------------------


def per_sample_gradients(module, names, loss_of_one, *batch):
    """For each named layer ``(n, d_out, d_in)``, or ``(n, d_out, d_in + 1)`` with a bias.

    ``loss_of_one(module, *sample)`` gets each tensor of the batch cut down to one row. It runs on
    a copy that can be differentiated everywhere, so frozen layers have gradients too.
    """
    module = copy.deepcopy(module).requires_grad_(True)
    layers = [module.get_submodule(name) for name in names]
    found = [[] for _ in names]
    for i in range(len(batch[0])):
        loss = loss_of_one(module, *(part[i : i + 1] for part in batch))
        for rows, full in zip(found, _full_gradients(loss, layers), strict=True):
            rows.append(full)
    return [torch.stack(rows) for rows in found]


def _full_gradients(loss, layers):
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    gradients = iter(
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    )
    for layer in layers:
        full = next(gradients).flatten(1)
        if layer.bias is not None:
            full = torch.cat([full, next(gradients)[:, None]], dim=1)
        yield full


def numbers(tensor):
    return tensor.detach().double().flatten().tolist()


def inner(a, b):
    return math.fsum(x * y for x, y in zip(numbers(a), numbers(b), strict=True))


def norm(a):
    return math.sqrt(inner(a, a))


def mean(tensors):
    return weighted_sum([1 / len(tensors)] * len(tensors), tensors)


def weighted_sum(weights, tensors):
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for weight, tensor in zip(weights, tensors, strict=True):
        total += weight * tensor.double()
    return total


def assert_gradients(found, expected, seed=0):
    """Everything that captured gradients can be asked, against full ones, to 1e-10 relative."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(expected.shape[1:], generator=generator, dtype=torch.float64)
    mixtures = torch.randn(len(expected), 3, generator=generator, dtype=torch.float64)
    lengths = [norm(g) for g in expected]
    longest = max(lengths)
    mixed = [weighted_sum(column, expected) for column in mixtures.T.tolist()]
    assert len(found) == len(expected)
    assert_near(found.squared_norms(), [inner(g, g) for g in expected], longest**2)
    assert_near(found.dot(full), [inner(g, full) for g in expected], longest * norm(full))
    for one_hot, g in zip(torch.eye(len(expected)), expected, strict=True):
        torch.testing.assert_close(found.mixture(one_hot), g, rtol=0, atol=1e-10 * longest + 1e-300)
    torch.testing.assert_close(
        found.mixture(mixtures[:, 0]), mixed[0], rtol=0, atol=1e-10 * sum(lengths) + 1e-300
    )
    products = [[inner(g, m) for m in mixed] for g in expected]
    scale = longest * max(norm(m) for m in mixed)
    assert_near(found.products(found, mixtures), products, scale)


def assert_near(found, expected, scale=1.0):
    """Within 1e-10 of the scale of what was added up, which cancellation can leave small."""
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale + 1e-300)


# --- metrics of one layer ----------------------------------------------------------------------


def median(values):
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def median_and_mad(values):
    middle = median(values)
    return middle, median([abs(v - middle) for v in values])


def activation_score(h, middle, mad):
    """Equation 7, s: a MAD of 0 leaves a step at the median."""
    if mad == 0:
        return 0.5 if norm(h) == middle else float(norm(h) > middle)
    z = (norm(h) - middle) / (1.4826 * mad)
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def quality(h, middle, mad):
    return 1 - abs(2 * activation_score(h, middle, mad) - 1)


def relevance(g, label, reference, reference_labels, minimum=3):
    """Equation 8: cosine with the mean of the label's reference gradients, or of all of them."""
    own = [r for r, at in zip(reference, reference_labels, strict=True) if at == label]
    target = mean(own if label >= 0 and len(own) >= minimum else list(reference))
    lengths = norm(g) * norm(target)
    return inner(g, target) / lengths if lengths else 0.0


def diversity(h, selected, bandwidth_squared):
    """Equation 9."""
    kernels = []
    for other in selected:
        squared = math.fsum((x - y) ** 2 for x, y in zip(numbers(h), numbers(other), strict=True))
        kernels.append(math.exp(-squared / (2 * bandwidth_squared)))
    return -math.log(math.fsum(kernels) / len(kernels))


# --- metrics of the whole network --------------------------------------------------------------


def gradient_impact(layers, momentum):
    """Equation 11, from one sample's full gradient in each layer."""
    length = math.sqrt(math.fsum(inner(m, m) for m in momentum))
    if length == 0:
        return 0.0
    return math.fsum(inner(g, m) for g, m in zip(layers, momentum, strict=True)) / length


def entropy(shares):
    return -math.fsum(p * math.log(p) for p in shares if p > 0)


def predictive_entropy(logits):
    values = numbers(logits)
    powers = [math.exp(v - max(values)) for v in values]
    return entropy([p / math.fsum(powers) for p in powers]) / math.log(len(values))


def activation_entropy(h):
    sizes = [abs(x) for x in numbers(h)]
    total = math.fsum(sizes)
    if len(sizes) == 1 or total == 0:
        return 0.0
    return entropy([x / total for x in sizes]) / math.log(len(sizes))


def uncertainty(predictive, layers, hidden_weight=0.1):
    """Equation 12, from one sample's representation in each layer."""
    hidden = [activation_entropy(h) for h in layers]
    return predictive + hidden_weight * math.fsum(hidden) / len(hidden)


def spread(h):
    values = numbers(h)
    return math.sqrt(variance(values))


def variance(values):
    middle = math.fsum(values) / len(values)
    return math.fsum((v - middle) ** 2 for v in values) / len(values)


def stability(losses):
    """Equation 13, over the states in which the loss is known."""
    known = [x for x in losses if not math.isnan(x)]
    return 1 / (1 + variance(known)) if known else 1.0


# --- ranks and the value -----------------------------------------------------------------------


def rank_normalise(values):
    if len(values) == 1:
        return [0.5]
    ranks = []
    for value in values:
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        ranks.append((below + (equal - 1) / 2) / (len(values) - 1))
    return ranks


def layer_value(quality, relevance, diversity, w):
    """Equation 6."""
    return w[0] * quality + w[1] * relevance + w[2] * diversity


def global_value(impact, uncertainty, stability, w):
    """Equation 10."""
    return w[3] * impact + w[4] * uncertainty + w[5] * stability


def dvc_value(layers, whole, w, alpha):
    """Equation 5, from one sample's three figures in each layer and three of the network."""
    total = global_value(*whole, w)
    for figures, share in zip(layers, alpha, strict=True):
        total += share * layer_value(*figures, w)
    return total
