import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Accuracy, MeanSquaredError

from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.objective import Outcome, resolve_objective
from lightning_dvc.errors import ObjectiveError

N, C, D = 6, 4, 5


class Net(LightningModule):
    """A linear layer whose training step is a function given to it."""

    def __init__(self, step, d_out=C):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(D, d_out, dtype=torch.float64)
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(*shape, high=C, seed=2):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def look(module, batch, n=N, objective=None):
    with undisturbed(module):
        return resolve_objective(module, objective)(module, batch, n)


def own_losses(loss_of_one, module, x):
    """The slow, obviously right way: sample by sample, a batch of one, a plain call."""
    return torch.stack([loss_of_one(module.layer(x[i : i + 1]), i) for i in range(len(x))])


def assert_matches(outcome, module, expected):
    torch.testing.assert_close(outcome.losses, expected)
    for i in range(len(expected)):
        found, wanted = (
            torch.autograd.grad(losses[i], module.layer.weight, retain_graph=True)[0]
            for losses in (outcome.losses, expected)
        )
        torch.testing.assert_close(found, wanted)


# --- every loss function against the loop ------------------------------------------------------

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
LABELS = classes(N)
PARTLY_IGNORED = torch.where(torch.arange(N) % 3 == 1, -100, LABELS)
SOFT = draw(N, C, seed=3).softmax(1)
HARD = (draw(N, C, seed=4) > 0).double()
VALUES = draw(N, C, seed=5)
VARIANCES = draw(N, C, seed=6).square() + 0.1


def nll(inputs, *args, **kwargs):
    return F.nll_loss(inputs.log_softmax(1), *args, **kwargs)


def bce(inputs, *args, **kwargs):
    return F.binary_cross_entropy(inputs.sigmoid(), *args, **kwargs)


UNWEIGHTED = {
    "cross_entropy": (F.cross_entropy, LABELS, "multiclass"),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.1), LABELS, "multiclass"),
    "soft": (F.cross_entropy, SOFT, "multiclass"),
    "nll": (nll, LABELS, "multiclass"),
    "bce": (bce, HARD, "multilabel"),
    "bce_logits": (F.binary_cross_entropy_with_logits, HARD, "multilabel"),
    "pos_weight": (
        partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
        HARD,
        "multilabel",
    ),
    "label_weight": (
        partial(F.binary_cross_entropy_with_logits, weight=WEIGHT),
        HARD,
        "multilabel",
    ),
    "mse": (F.mse_loss, VALUES, "regression"),
    "l1": (F.l1_loss, VALUES, "regression"),
    "smooth_l1": (partial(F.smooth_l1_loss, beta=0.5), VALUES, "regression"),
    "huber": (partial(F.huber_loss, delta=0.3), VALUES, "regression"),
}


@pytest.mark.parametrize("reduction", ["mean", "sum / n", "none, mean", "sum", "reduce=False"])
@pytest.mark.parametrize("name", UNWEIGHTED)
def test_each_loss_gives_what_a_batch_of_one_returns(name, reduction):
    function, targets, kind = UNWEIGHTED[name]
    steps = {
        "mean": lambda z, y: function(z, y),
        "sum / n": lambda z, y: function(z, y, reduction="sum") / len(z),
        "none, mean": lambda z, y: function(z, y, reduction="none").mean(),
        "sum": lambda z, y: function(z, y, reduction="sum"),
        "reduce=False": lambda z, y: function(z, y, reduction="none").sum() / len(z),
    }
    step = steps[reduction]
    module, x = Net(lambda self, batch: step(self.layer(batch[0]), batch[1])), draw(N, D)
    outcome = look(module, (x, targets))
    expected = own_losses(lambda z, i: step(z, targets[i : i + 1]), module, x)
    assert_matches(outcome, module, expected)
    assert outcome.kind == kind
    assert outcome.outputs.shape == (N, C)
    assert not outcome.outputs.requires_grad
    torch.testing.assert_close(outcome.targets, targets)
    if reduction != "sum":
        torch.testing.assert_close(outcome.losses.mean(), step(module.layer(x), targets))


@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
@pytest.mark.parametrize(
    ("flags", "reduction"),
    [
        ({"reduce": False}, "none"),
        ({"size_average": False}, "sum"),
        ({"size_average": True}, "mean"),
        ({"size_average": False, "reduce": False}, "none"),
    ],
)
def test_deprecated_flags_of_torch(flags, reduction):
    def step(self, batch):
        loss = F.mse_loss(self.layer(batch[0]), batch[1], **flags)
        return loss if reduction == "mean" else loss.sum() / batch[1].numel()

    module, x = Net(step), draw(N, D)
    expected = own_losses(lambda z, i: F.mse_loss(z, VALUES[i : i + 1]), module, x)
    assert_matches(look(module, (x, VALUES)), module, expected)


@pytest.mark.parametrize(
    "function", [F.cross_entropy, nll, partial(F.cross_entropy, label_smoothing=0.2)]
)
def test_class_weights_are_not_divided_by_those_of_the_batch(function):
    function = partial(function, weight=WEIGHT)
    module = Net(lambda self, batch: function(self.layer(batch[0]), batch[1]))
    x = draw(N, D)

    def alone(z, i):
        return function(z, LABELS[i : i + 1], reduction="sum")

    assert_matches(look(module, (x, LABELS)), module, own_losses(alone, module, x))


@pytest.mark.parametrize("function", [F.cross_entropy, nll])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_ignored_samples_lose_nothing_and_have_no_class(function, ignored):
    targets = PARTLY_IGNORED if ignored == -100 else LABELS
    module = Net(lambda self, batch: function(self.layer(batch[0]), batch[1], ignore_index=ignored))
    x = draw(N, D)
    outcome = look(module, (x, targets))

    def alone(z, i):
        return function(z, targets[i : i + 1], ignore_index=ignored, reduction="sum")

    assert_matches(outcome, module, own_losses(alone, module, x))
    gone = targets == ignored
    assert gone.any()
    torch.testing.assert_close(outcome.labels(), torch.where(gone, -1, targets))


# torch does not hand the weight of l1_loss on to a TorchFunctionMode: it cannot be seen there, nor
# that it is missing. Strict: the release that mends it fails here, and the mark and the line in
# docs/compatibility.md go.
WEIGHTLESS = pytest.param(F.l1_loss, marks=pytest.mark.xfail(reason="torch drops the weight"))


@pytest.mark.parametrize("function", [F.mse_loss, F.huber_loss, WEIGHTLESS])
def test_element_weights_act_as_without_reduction(function):
    weight = VARIANCES
    module, x = Net(lambda self, b: function(self.layer(b[0]), b[1], weight=weight)), draw(N, D)

    def alone(z, i):
        rows = slice(i, i + 1)
        return function(z, VALUES[rows], weight=weight[rows], reduction="none").mean()

    assert_matches(look(module, (x, VALUES)), module, own_losses(alone, module, x))


@pytest.mark.parametrize("shape", ["full", "one", "short", "number"])
@pytest.mark.parametrize("full", [True, False])
def test_gaussian_nll(shape, full):
    variances = {
        "full": VARIANCES,
        "one": VARIANCES[:, :1],
        "short": VARIANCES[:, 0],
        "number": 0.7,
    }[shape]
    module = Net(lambda self, b: F.gaussian_nll_loss(self.layer(b[0]), b[1], variances, full))
    x = draw(N, D)

    def alone(z, i):
        rows = slice(i, i + 1)
        var = variances if shape == "number" else variances[rows]
        return F.gaussian_nll_loss(z, VALUES[rows], var, full)

    outcome = look(module, (x, VALUES))
    assert_matches(outcome, module, own_losses(alone, module, x))
    assert outcome.kind == "gaussian"
    assert outcome.variances.shape == (N, C)
    first = 0.7 if shape == "number" else VARIANCES[1, 0].item()
    assert outcome.variances[1, 0].item() == pytest.approx(first)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, C)])
@pytest.mark.parametrize("logits", [True, False])
def test_shapes_of_binary_targets(shape, logits):
    targets = HARD.flatten()[: torch.Size(shape).numel()].reshape(shape)
    loss = F.binary_cross_entropy_with_logits if logits else bce
    d_out = shape[1] if len(shape) > 1 else 1
    module = Net(lambda self, b: loss(self.layer(b[0]).reshape(shape), b[1]), d_out)
    x = draw(N, D)
    outcome = look(module, (x, targets))
    expected = own_losses(
        lambda z, i: loss(z.reshape(1, d_out), targets[i].reshape(1, d_out)), module, x
    )
    assert_matches(outcome, module, expected)
    assert outcome.kind == ("multilabel" if d_out > 1 else "binary")
    torch.testing.assert_close(outcome.outputs, module.layer(x).detach())
    labels = targets.reshape(N, -1)[:, 0].long() if d_out == 1 else torch.full((N,), -1)
    torch.testing.assert_close(outcome.labels(), labels)


@pytest.mark.parametrize("layout", ["flattened", "channels"])
def test_tokens_are_averaged_per_sample_over_those_that_count(layout):
    tokens = 3
    x, targets = draw(N, tokens, D), classes(N, tokens)
    targets[0, 1:], targets[3] = -100, -100

    def loss(z, y):
        if layout == "flattened":
            return F.cross_entropy(z.reshape(-1, C), y.reshape(-1))
        return F.cross_entropy(z.transpose(1, 2), y)

    def alone(z, i):
        return z.sum() * 0 if i == 3 else loss(z, targets[i : i + 1])

    module = Net(lambda self, batch: loss(self.layer(batch[0]), batch[1]))
    outcome = look(module, (x, targets))
    assert_matches(outcome, module, own_losses(alone, module, x))
    assert outcome.labels().tolist() == [-1] * N
    shares = module.layer(x).softmax(-1)
    true = [[shares[i, t, y].item() for t, y in enumerate(row) if y >= 0] for i, row in
            enumerate(targets.tolist())]  # fmt: skip
    confidence = [sum(row) / len(row) if row else 1.0 for row in true]
    assert outcome.confidence().tolist() == pytest.approx(confidence)
    assert outcome.entropy()[3] == 0
    assert ((outcome.entropy() > 0) & (outcome.entropy() < 1)).sum() == N - 1


# --- how a sample's loss depends on its batch --------------------------------------------------

CHUNKED = {
    "mean": lambda z, y: F.cross_entropy(z, y),
    "weights": lambda z, y: F.cross_entropy(z, y, weight=WEIGHT),
    "undivided": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "undivided elements": lambda z, y: 0.2 * F.cross_entropy(z, y, reduction="none").sum(),
    "divided": lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(z),
    "both": lambda z, y: F.cross_entropy(z, y) + F.mse_loss(z, z.detach() + 1, reduction="sum"),
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("cuts", [[40, 80], [64, 95], [1, 50]])
def test_losses_do_not_depend_on_how_batches_are_cut(name, cuts):
    x, y = draw(96, D), classes(96)
    module = Net(lambda self, batch: CHUNKED[name](self.layer(batch[0]), batch[1]))
    objective = resolve_objective(module)
    whole = look(module, (x, y), n=96).losses
    edges = [0, *cuts, 96]
    with undisturbed(module):
        parts = [
            objective(module, (x[a:b], y[a:b]), b - a).losses for a, b in itertools.pairwise(edges)
        ]
    torch.testing.assert_close(torch.cat(parts), whole)


# --- steps made of several losses --------------------------------------------------------------


def test_several_losses_with_coefficients():
    def step(self, batch):
        z = self.layer(batch[0])
        return 0.3 * F.mse_loss(z, batch[2]) + 2 * F.cross_entropy(z, batch[1]) / 5

    def alone(z, i):
        rows = slice(i, i + 1)
        return 0.3 * F.mse_loss(z, VALUES[rows]) + 0.4 * F.cross_entropy(z, LABELS[rows])

    module, x = Net(step), draw(N, D)
    outcome = look(module, (x, LABELS, 10 * VALUES))
    assert outcome.kind == "multiclass"  # although the other loss is larger
    outcome = look(module, (x, LABELS, VALUES))
    assert_matches(outcome, module, own_losses(alone, module, x))


def test_largest_of_several_classification_losses_stands_for_the_step():
    other = draw(N, C, seed=9)

    def step(self, batch):
        z = self.layer(batch[0])
        return 0.1 * F.cross_entropy(z + other, LABELS) + F.cross_entropy(z, LABELS)

    module, x = Net(step), draw(N, D)
    torch.testing.assert_close(look(module, (x,)).outputs, module.layer(x).detach())


def test_in_place_addition_to_a_loss():
    def step(self, batch):
        z = self.layer(batch[0])
        loss = F.cross_entropy(z, LABELS)
        loss += 0.5 * F.mse_loss(z, VALUES)
        loss *= 2
        return loss

    def alone(z, i):
        rows = slice(i, i + 1)
        return 2 * F.cross_entropy(z, LABELS[rows]) + F.mse_loss(z, VALUES[rows])

    module, x = Net(step), draw(N, D)
    assert_matches(look(module, (x,)), module, own_losses(alone, module, x))


def test_sample_weights_applied_by_hand():
    weights = torch.arange(1.0, N + 1, dtype=torch.float64) / 3

    def step(self, batch):
        return (weights * F.cross_entropy(self.layer(batch[0]), LABELS, reduction="none")).mean()

    def alone(z, i):
        return weights[i] * F.cross_entropy(z, LABELS[i : i + 1])

    module, x = Net(step), draw(N, D)
    assert_matches(look(module, (x,)), module, own_losses(alone, module, x))


def test_focal_loss_keeps_the_gradient_of_its_factor():
    def focal(z, y):
        p = torch.sigmoid(z)
        missed = torch.where(y > 0.5, 1 - p, p)
        loss = F.binary_cross_entropy_with_logits(z, y, reduction="none")
        return (missed**2 * loss).mean()

    module, x = Net(lambda self, batch: focal(self.layer(batch[0]), HARD)), draw(N, D)
    expected = own_losses(lambda z, i: focal(z, HARD[i : i + 1]), module, x)
    assert_matches(look(module, (x,)), module, expected)


def test_loss_that_does_not_enter_the_result_does_not_count():
    def step(self, batch):
        z = self.layer(batch[0])
        F.mse_loss(z, 100 + VALUES)
        with torch.no_grad():
            F.cross_entropy(z, LABELS).numpy()
        assert F.l1_loss(z.detach(), VALUES).numpy() > 0
        return F.mse_loss(z, VALUES)

    module, x = Net(step), draw(N, D)
    outcome = look(module, (x,))
    expected = own_losses(lambda z, i: F.mse_loss(z, VALUES[i : i + 1]), module, x)
    assert_matches(outcome, module, expected)
    assert outcome.kind == "regression"


@pytest.mark.parametrize(
    "extra",
    [
        lambda self, z, loss: loss + 0.1 * self.layer.weight.square().sum(),
        lambda self, z, loss: loss + 0.1 * z.abs().mean(),
        lambda self, z, loss: loss.exp(),
        lambda self, z, loss: z.square().mean(),
    ],
)
def test_loss_computed_by_other_means_is_refused_with_both_numbers(extra):
    seen = []

    def step(self, batch):
        z = self.layer(batch[0])
        seen.append(extra(self, z, F.cross_entropy(z, LABELS)))
        return seen[-1]

    with pytest.raises(ObjectiveError, match="other means") as caught:
        look(Net(step), (draw(N, D),))
    assert f"{seen[0].item():.6g}" in str(caught.value)
    assert "objective=" in str(caught.value)
    assert "per_sample_loss" in str(caught.value)


def test_check_waits_for_the_first_finite_loss():
    module = Net(lambda self, b: F.mse_loss(self.layer(b), VALUES) + self.layer.weight.sum())
    objective, x = resolve_objective(module), draw(N, D)
    broken = x.clone()
    broken[0, 0] = torch.nan
    assert objective(module, broken, N).losses.isfinite().sum() == N - 1
    with pytest.raises(ObjectiveError, match="other means"):
        objective(module, x, N)


class Growing(Net):
    """A part of the loss, which is 0 at first, comes from no loss function."""

    def __init__(self, part):
        super().__init__(lambda self, b: F.mse_loss(self.layer(b), VALUES) + self.part * self.own())
        self.part = part

    def own(self):
        return self.layer.weight.square().sum()


def test_what_comes_to_a_loss_later_is_a_warning():
    module, x = Growing(0.0), draw(N, D)
    objective = resolve_objective(module)
    losses = objective(module, x, N).losses
    module.part = 1.0
    with pytest.warns(UserWarning, match="accounted for before") as caught:
        later = [objective(module, x, N).losses for _ in range(3)]
    assert len(caught) == 1  # not of every batch
    torch.testing.assert_close(later, 3 * [losses])


def test_a_module_that_was_accepted_before_is_so_again():
    module, x = Growing(1.0), draw(N, D)
    with pytest.raises(ObjectiveError, match="other means"):
        resolve_objective(module)(module, x, N)
    with pytest.warns(UserWarning, match="does not count"):
        resolve_objective(module, known=True)(module, x, N)


def test_half_precision_passes_the_check():
    def step(self, batch):
        z = self.layer(batch[0]).bfloat16()
        return F.cross_entropy(z, LABELS) + 0.3 * F.mse_loss(z, VALUES.bfloat16())

    assert look(Net(step), (draw(N, D),)).losses.shape == (N,)


def test_losses_cast_under_autocast_pass_the_check():
    def step(self, batch):
        z = self.layer(batch[0])
        return F.cross_entropy(z, LABELS, reduction="none").to(z.dtype).mean().float()

    module = Net(step).float()
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            assert look(module, (torch.randn(N, D),)).losses.shape == (N,)


def test_losses_reach_the_outputs_of_layers():
    captured = []
    module = Net(lambda self, b: F.cross_entropy(self.layer(b), LABELS))
    handle = module.layer.register_forward_hook(lambda layer, args, out: captured.append(out))
    losses = look(module, draw(N, D)).losses
    handle.remove()
    (delta,) = torch.autograd.grad(losses.sum(), captured[0])
    wanted = captured[0].softmax(1) - F.one_hot(LABELS, C)
    torch.testing.assert_close(delta, wanted)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_without_gradients_losses_are_the_same_and_there_is_no_graph(weight):
    def step(self, batch):
        logits = self.layer(batch)
        assert logits.requires_grad == torch.is_grad_enabled() & self.layer.weight.requires_grad
        return weight * F.cross_entropy(logits, LABELS) + F.mse_loss(logits, torch.ones(N, C))

    module, batch = Net(step), draw(N, D)
    module.layer.bias.requires_grad_(False)
    objective = resolve_objective(module)
    with_graph = objective(module, batch, N)
    with torch.no_grad():
        without = objective(module, batch, N)
    torch.testing.assert_close(without.losses, with_graph.losses.detach())
    assert torch.equal(without.outputs, with_graph.outputs)
    assert module.layer.weight.requires_grad
    assert not module.layer.bias.requires_grad


def test_parameters_train_on_after_a_step_that_fails():
    def step(self, batch):
        raise ValueError("no")

    module = Net(step)
    with torch.no_grad(), pytest.raises(ValueError, match="no"):
        resolve_objective(module)(module, draw(N, D), N)
    assert all(p.requires_grad for p in module.parameters())


# --- many kinds of training step ---------------------------------------------------------------


class Busy(LightningModule):
    """Logs, counts, keeps outputs, returns a dict, has its loss as a module."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, C)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.accuracy = Accuracy("multiclass", num_classes=C)
        self.error = MeanSquaredError()
        self.kept = []

    def training_step(self, batch, batch_idx):
        z = self.layer(batch["data"]["x"])
        loss = self.loss(z, batch["y"])
        self.accuracy(z, batch["y"])
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_epoch=True, prog_bar=True)
        self.log_dict({"error": self.error(z.softmax(1)[:, 0], (batch["y"] == 0).float())})
        self.kept.append(loss.detach())
        return {"loss": loss, "predictions": z}


def test_busy_module_without_trainer():
    module, x = Busy(), draw(N, D).float()
    outcome = look(module, {"data": {"x": x}, "y": LABELS})
    expected = module.loss(module.layer(x), LABELS)
    torch.testing.assert_close(outcome.losses.mean(), expected)
    torch.testing.assert_close(outcome.labels(), LABELS)
    assert module.kept == []
    assert module.accuracy.update_count == 0


class Signature(Net):
    def __init__(self, seen):
        super().__init__(None)
        self.seen = seen

    def result(self, batch, *arguments):
        self.seen.append(arguments)
        return F.cross_entropy(self.layer(batch), LABELS)


class NoIndex(Signature):
    def training_step(self, batch):
        return self.result(batch)


class OtherName(Signature):
    def training_step(self, batch, i):
        return self.result(batch, i)


class TwoLoaders(Signature):
    def training_step(self, batch, batch_idx, dataloader_idx):
        return self.result(batch, batch_idx, dataloader_idx)


class Defaults(Signature):
    def training_step(self, batch, batch_idx=None, scale=3.0):
        return self.result(batch, batch_idx, scale)


class Stars(Signature):
    def training_step(self, batch, *args, **kwargs):
        return self.result(batch, *args, *kwargs.values())


class KeywordOnly(Signature):
    def training_step(self, batch, *, batch_idx, verbose=True):
        return self.result(batch, batch_idx, verbose)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (NoIndex, ()),
        (OtherName, (0,)),
        (TwoLoaders, (0, 0)),
        (Defaults, (0, 3.0)),
        (Stars, (0,)),
        (KeywordOnly, (0, True)),
    ],
)
def test_arguments_of_the_training_step(kind, arguments):
    seen = []
    module = kind(seen)
    objective = resolve_objective(module)
    assert objective(module, draw(N, D), N).losses.shape == (N,)
    assert seen == [arguments]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda z: None, "returned None"),
        (lambda z: {"logits": z}, "keys \\['logits'\\]"),
        (lambda z: 3.0, "a float"),
        (lambda z: F.cross_entropy(z, LABELS, reduction="none"), "shape \\(6,\\)"),
        (lambda z: F.cross_entropy(z, LABELS).detach(), "requires_grad=False"),
    ],
)
def test_step_without_a_usable_loss_is_refused(returned, message):
    with pytest.raises(ObjectiveError, match=message):
        look(Net(lambda self, batch: returned(self.layer(batch))), draw(N, D))


def test_losses_that_cannot_be_dealt_out_are_refused():
    module = Net(lambda self, batch: F.cross_entropy(self.layer(batch), LABELS))
    with pytest.raises(ObjectiveError, match="multiple of 4 losses"):
        look(module, draw(N, D), n=4)


def test_time_before_batch_is_refused():
    module = Net(lambda self, batch: F.mse_loss(self.layer(batch), torch.ones(4, N, C)))
    with pytest.raises(ObjectiveError, match="first axis"):
        look(module, draw(4, N, D))


def test_manual_optimisation_is_refused_and_told_the_ways_out():
    module = Net(None)
    module.automatic_optimization = False
    with pytest.raises(ObjectiveError, match=r"manually.*objective=.*per_sample_loss"):
        resolve_objective(module)
    resolve_objective(module, lambda module, batch: None)


def test_module_without_a_step_is_told_the_ways_out():
    for module in (LightningModule(), nn.Linear(1, 1)):
        with pytest.raises(ObjectiveError, match=r"training_step.*objective=.*per_sample_loss"):
            resolve_objective(module)


def test_objective_of_a_training_step_can_be_pickled():
    module, x = Busy(), draw(N, D).float()
    objective = pickle.loads(pickle.dumps(resolve_objective(module)))
    with undisturbed(module):
        assert objective(module, {"data": {"x": x}, "y": LABELS}, N).kind == "multiclass"


# --- losses that the user gives ----------------------------------------------------------------


class WithMethod(Net):
    def per_sample_loss(self, batch):
        z = self.layer(batch)
        return F.cross_entropy(z, LABELS, reduction="none"), z, LABELS


def refuse(self, batch):
    raise AssertionError("training_step must not run")


def given_losses(module, batch):
    return 3 * F.mse_loss(module.layer(batch), VALUES, reduction="none").mean(1), None


def test_method_of_the_module_comes_before_its_step():
    module, x = WithMethod(refuse), draw(N, D)
    outcome = look(module, x)
    expected = own_losses(lambda z, i: F.cross_entropy(z, LABELS[i : i + 1]), module, x)
    assert_matches(outcome, module, expected)
    assert outcome.kind == "multiclass"
    torch.testing.assert_close(outcome.labels(), LABELS)


def test_function_of_the_user_comes_before_everything():
    module, x = WithMethod(refuse), draw(N, D)
    outcome = look(module, x, objective=given_losses)
    expected = own_losses(lambda z, i: 3 * F.mse_loss(z, VALUES[i : i + 1]), module, x)
    assert_matches(outcome, module, expected)
    assert outcome.kind == "unknown"


def test_outcome_of_the_user_is_passed_on():
    losses = torch.ones(N, requires_grad=True)
    outcome = Outcome(losses, VALUES, VALUES, "gaussian", VARIANCES)
    assert look(Net(None), None, objective=lambda module, batch: outcome) is outcome


GOOD = torch.ones(N, requires_grad=True)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (GOOD, "returned a Tensor"),
        ((GOOD,), "tuple of 1"),
        ((GOOD, None, None, None), "tuple of 4"),
        ((1.0, None), "losses are a float"),
        ((GOOD, [1, 2]), "outputs are a list"),
        ((GOOD.mean(), None), r"shape \(6,\).*shape \(\)"),
        ((GOOD[:, None], None), r"shape \(6, 1\)"),
        ((torch.ones(N, dtype=torch.long), None), "int64"),
        ((torch.ones(N), None), "without detach"),
        ((GOOD, torch.ones(3, C)), r"outputs with 6 rows.*\(3, 4\)"),
        ((GOOD, torch.ones(N, C), torch.tensor(1)), r"targets with 6 rows"),
    ],
)
def test_what_the_user_returns_is_checked(returned, message):
    with pytest.raises(ObjectiveError, match=message):
        look(Net(None), None, objective=lambda module, batch: returned)


def test_objective_must_be_callable():
    with pytest.raises(ObjectiveError, match="a str"):
        resolve_objective(Net(None), "cross_entropy")


def penalised(module, batch):
    """A loss with a gradient penalty, which needs gradients whatever it is called for."""
    x = batch.detach().requires_grad_()
    losses = module.layer(x).square().sum(1)
    (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + slope.square().sum(1), None


def test_a_function_that_takes_gradients_of_its_own_works_without_gradients_too():
    module, batch = Net(None), draw(N, D)
    objective = resolve_objective(module, penalised)
    wanted = objective(module, batch, N).losses.detach()
    with torch.no_grad():
        torch.testing.assert_close(objective(module, batch, N).losses.detach(), wanted)
    assert module.layer.weight.requires_grad
