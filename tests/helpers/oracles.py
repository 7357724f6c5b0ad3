"""Slow and obviously right: every definition once more, one sample and one number at a time.

Gradients come from ``torch.autograd.grad`` on batches of one. The metrics are written from the
equations in the documentation, on plain Python floats, without calling the library. Assertions
ask the library's objects everything that these can be asked.
"""

import copy
import math

import torch
from torch import nn

# --- networks whose gradients are taken --------------------------------------------------------


class Net(nn.Module):
    """Layers by name and a forward pass given as a function; weights are drawn from a seed."""

    def __init__(self, layers, forward):
        super().__init__()
        torch.manual_seed(0)
        for name, make in layers.items():
            self.add_module(name, make())
        for parameter in self.parameters():  # so that no scale is 1 and no shift 0
            parameter.data += torch.randn_like(parameter) / 5
        self.double().eval()
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def tokens(*shape, below, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def own_losses(net, x):
    """Each sample's own loss, nonlinear in every output, whatever the shape of the output."""
    outputs = net(x).flatten(1)
    return torch.logsumexp(outputs, 1) + (outputs * torch.arange(outputs.shape[1])).cos().sum(1)


# --- gradients ---------------------------------------------------------------------------------

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
    """Rows of outputs by columns of inputs, the bias last; of a norm a column of scales."""
    kept = [(layer, layer.weight, getattr(layer, "bias", None)) for layer in layers]
    parameters = [p for _, *pair in kept for p in pair if p is not None]
    gradients = iter(
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    )
    for layer, _, bias in kept:
        weight = next(gradients)
        full = weight.reshape(-1, 1) if isinstance(layer, NORMS) else weight.flatten(1)
        if bias is not None:
            full = torch.cat([full, next(gradients).reshape(-1, 1)], dim=1)
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
    n = len(expected)
    assert len(found) == n
    assert found.full_shape == expected.shape[1:]
    assert isinstance(found.form, str)
    assert_answers(found, expected, seed)
    assert_same(found.formed().gradients, expected)
    assert_grams(found, found, expected, expected)
    for index in (torch.arange(n).flip(0), torch.arange(n) % 2 == 0, slice(1, None)):
        assert_same(found.rows(index).formed().gradients, expected[index])
    one = expected[0].numel()
    for size in (1, 2 * one, n * one):
        assert_parts(found.parts(size), expected, seed)
    kept = found.tensors()
    assert all(len(tensor) == n for tensor in kept.values())
    copies = {name: tensor.clone() for name, tensor in kept.items()}
    assert_answers(found.rows(slice(0, 0)).restored(copies), expected, seed)


def assert_answers(found, expected, seed=0):
    """Norms, inner products and the sum."""
    full = normal(*expected.shape[1:], seed=seed)
    lengths = [norm(g) for g in expected]
    assert_near(found.squared_norms(), [inner(g, g) for g in expected], [x**2 for x in lengths])
    slack = [(1 + 1e-12) * bound for bound in numbers(found.bound())]
    assert all(inner(g, g) <= bound for g, bound in zip(expected, slack, strict=True))
    assert_near(
        found.dot(full), [inner(g, full) for g in expected], [x * norm(full) for x in lengths]
    )
    into = full.clone()
    found.accumulate(into)
    total = weighted_sum([1] * len(expected), expected)
    assert_near(into, full + total, sum(lengths, norm(full)))
    assert_near(found.sum(), total, sum(lengths))
    weights = normal(len(expected), seed=seed + 2)  # of both signs
    both = zip(weights.tolist(), lengths, strict=True)
    slack_of_sum = sum(abs(weight) * length for weight, length in both)
    assert_near(found.weighted_sum(weights), weighted_sum(weights.tolist(), expected), slack_of_sum)


def assert_parts(parts, expected, seed=0):
    """Together all samples, in order, each part as good as the whole."""
    seen = []
    for rows, part in parts:
        numbers_of_rows = range(len(expected))[rows]
        assert len(part) == len(numbers_of_rows)
        assert_answers(part, expected[rows], seed)
        seen += numbers_of_rows
    assert seen == list(range(len(expected)))


def assert_grams(ours, theirs, expected, reference):
    slow = [[inner(g, r) for r in reference] for g in expected]
    scale = [[norm(g) * norm(r) for r in reference] for g in expected]
    assert_near(ours.gram(theirs), slow, scale)


def assert_same(found, expected):
    """Gradients one by one, each to 1e-10 of its length."""
    lengths = torch.tensor([norm(g) for g in expected], dtype=torch.float64)
    assert_near(found, expected, lengths[:, None, None].expand_as(expected))


def assert_near(found, expected, scale=1.0):
    """Within 1e-10 of the scale of what was added up, which cancellation can leave small."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape
    scale = torch.as_tensor(scale, dtype=torch.float64).clamp(min=1e-290)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-10, equal_nan=True)


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


def class_mean(label, reference, reference_labels, minimum=3):
    """The mean reference gradient of the label, of all without labels; None of too few."""
    own = [r for r, at in zip(reference, reference_labels, strict=True) if at == label]
    by_class = label >= 0 and max(reference_labels) >= 0
    if by_class and len(own) < minimum:
        return None
    return mean(own if by_class else list(reference))


def relevance(g, label, reference, reference_labels):
    """Equation 8: cosine with the mean reference gradient of the label."""
    target = class_mean(label, reference, reference_labels)
    if target is None:
        return math.nan
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


def gradient_impact(layers, label, reference, reference_labels):
    """Equation 11, from full gradients: one of each layer, and of each layer the reference's."""
    targets = [class_mean(label, layer, reference_labels) for layer in reference]
    if any(target is None for target in targets):
        return math.nan
    length = math.sqrt(math.fsum(inner(m, m) for m in targets))
    if length == 0:
        return 0.0
    return math.fsum(inner(g, m) for g, m in zip(layers, targets, strict=True)) / length


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
    known = [value for value in values if not math.isnan(value)]
    ranks = []
    for value in values:
        below = sum(other < value for other in known)
        equal = sum(other == value for other in known)
        alone = len(known) == 1 or math.isnan(value)
        ranks.append(0.5 if alone else (below + (equal - 1) / 2) / (len(known) - 1))
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
