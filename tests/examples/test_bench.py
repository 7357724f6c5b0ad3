from dataclasses import replace

import pytest
import torch

from examples import datasets
from examples.bench import exactness, run
from examples.bench.measure import Calls, Figure, medians
from examples.bench.models import CASES, Case, Model
from examples.bench.scoring import EVERY, Bench, class_means, vmapped
from examples.paper import scale


@pytest.mark.parametrize(
    ("figure", "line"),
    [
        (Figure("a", 1.5, at_most=1.0), "a 1.5 ratio <= 1 SHORT"),
        (Figure("a", 1.0, at_most=1.0), "a 1 ratio <= 1 ok"),
        (Figure("b", 2e6, "rows/s", at_least=1e6), "b 2e+06 rows/s >= 1e+06 ok"),
        (Figure("b", 4.0, at_least=5), "b 4 ratio >= 5 SHORT"),
        (Figure("c", 0.25), "c 0.25 ratio"),
    ],
)
def test_lines_tell_whether_the_target_is_met(figure, line):
    assert str(figure).split() == line.split()


def test_functions_take_turns():
    calls = []
    times = medians(lambda: calls.append("a"), lambda: calls.append("b"), repeats=2)
    assert calls == ["a", "b"] * 3
    assert len(times) == 2


def test_every_type_of_layer_is_exact():
    figures = list(exactness.figures())
    assert len(figures) > 10
    assert [figure for figure in figures if not figure.value <= 1e-10] == []


def test_an_error_shows():
    layer = torch.nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert exactness.error(layer, x) < 1e-10
    layer.register_forward_hook(lambda _, args, out: out * 1.01)
    assert exactness.error(layer, x) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_models_train_and_are_scored(name):
    case = CASES[name]
    small = Case(case.make, case.shape, 8)
    bench = Bench(small, n_reference=100)  # at least three of each class
    last = list(bench.module.parameters())[-1]
    before = last.clone()
    bench.step()
    assert not torch.equal(before, last)
    (scores,) = bench.score(EVERY, bench.snapshots)
    assert len(scores) == 8
    assert scores.raw().isfinite().all()
    bench.candidates()


@pytest.mark.parametrize("name", CASES)
def test_sources_cost_few_calls_however_their_candidates_are_mixed(name):
    bench = Bench(Case(CASES[name].make, CASES[name].shape, 32), n_reference=100)
    one, six = (bench.calls(n_sources)[0] for n_sources in (1, 6))
    assert six < 1.25 * one


def test_calls_are_counted_but_for_views():
    x = torch.ones(2, 2)
    with Calls() as calls:
        x.T[0].add(1).mul_(2)
    x.add(1)
    assert calls.number == 2


def test_what_vmap_forms_is_what_is_asked_of_the_factors():
    bench = Bench(Case(CASES["mlp"].make, CASES["mlp"].shape, 16), n_reference=100)
    (captured,) = bench.probe.look(bench.loaded)
    found = vmapped(bench, class_means(bench))
    for layer, std, (norms, products) in zip(
        captured.gradients, bench.standards, found, strict=True
    ):
        torch.testing.assert_close(layer.squared_norms().sqrt(), norms, rtol=1e-3, atol=1e-6)
        ours = std.reference.products(layer, std.reference.columns(captured.labels))
        torch.testing.assert_close(ours, products, rtol=1e-3, atol=1e-6)
        assert ours.abs().min() > 1e-5


def test_the_model_is_a_plain_module():
    assert isinstance(Model(CASES["mlp"].make()).configure_optimizers(), torch.optim.Adam)


def test_a_run_is_told_by_sections_for_each_size_of_a_batch(monkeypatch):
    x = torch.randn(900, 3072, generator=torch.Generator().manual_seed(0))
    data = datasets.Data(x, torch.arange(900) % 10, 10, n_train=800)
    small = replace(scale.SIZES["cpu"], rows=(600,), proxy_epochs=3)
    monkeypatch.setitem(datasets.LOADERS, "cifar10", lambda folder: data)
    monkeypatch.setitem(scale.SIZES, "cpu", small)
    monkeypatch.setattr(run, "REPEATS", 1)
    caches = scale._loaded, scale.problem_of
    for cache in caches:
        cache.cache_clear()
    found = {figure.name: figure.value for figure in run.figures(None, "cpu", [32, 64])}
    for cache in caches:
        cache.cache_clear()
    for size in (32, 64):
        sections = [name for name in found if name.endswith(f"_{size}")][2:]
        total = sum(found[name] for name in sections)
        assert {f"examine_{size}", f"score_{size}"} <= set(sections)
        assert found[f"selection_{size}"] == pytest.approx(total)
        assert found[f"selection_{size}"] < found[f"run_{size}"]
