"""The harness of the paper's experiments, on data small enough for a test."""

import math
import os
import signal
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from itertools import product

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import nn
from torch.utils.data import DataLoader

from examples import ablation, datasets
from examples.compare import deal_out
from examples.paper import experiment, networks, report, scale
from examples.paper.__main__ import jobs_of, main
from examples.paper.experiment import BUDGETS, COLUMNS, N_VAL, Job, job_of
from examples.paper.methods import METHODS, PARTS, REFERENCES
from examples.runs import read_rows, run_all


def squared(number):
    return {"number": number, "square": float(number**2)}


def read_by_workers(number):
    loader = DataLoader(torch.arange(number), num_workers=1)
    return {"number": number, "square": float(sum(int(x) for x in loader))}


def broken(number):
    if number == 5:
        raise ArithmeticError("five")
    time.sleep(2)
    return squared(number)


def test_runs_may_have_processes_of_their_own(tmp_path):
    (row,) = run_all([4], read_by_workers, tmp_path / "runs.csv", ("number", "square"), 1)
    assert row == {"number": "4", "square": "6.0000"}


def test_a_run_that_fails_ends_all_and_what_was_done_is_kept(tmp_path):
    path, columns = tmp_path / "runs.csv", ("number", "square")
    with pytest.raises(ArithmeticError, match="five"):
        list(run_all([5, 3, 7, 9], broken, path, columns, processes=2))
    # What had begun beside it is written when it ends, and no other begins.
    assert [row["number"] for row in read_rows(path)] == ["3"]


def killed(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_all(tmp_path):
    with pytest.raises(BrokenProcessPool):
        list(run_all([1, 2], killed, tmp_path / "runs.csv", ("number", "square"), processes=1))


def test_no_runs_are_no_rows(tmp_path):
    assert list(run_all([], squared, tmp_path / "runs.csv", ("number", "square"), 2)) == []


def test_runs_are_written_as_they_end_and_gone_on_with(tmp_path):
    path, columns = tmp_path / "new" / "runs.csv", ("number", "square")
    rows = list(run_all([3, 5], squared, path, columns, processes=1))
    assert rows == read_rows(path) == [{"number": "3", "square": "9.0000"}, rows[1]]
    with path.open("a") as file:
        file.write("7,4")  # killed while it wrote, and the number may be cut short
    assert [row["number"] for row in read_rows(path)] == ["3", "5"]
    list(run_all([7], squared, path, columns, processes=1))
    assert path.read_text() == "number,square\n3,9.0000\n5,25.0000\n7,49.0000\n"
    with pytest.raises(ValueError, match=r"to have the columns number, but it has number,square"):
        list(run_all([1], squared, path, ("number",), processes=1))


SMALL = {"batch_size": 16, "epochs": 6, "steps": 60}


@pytest.fixture
def on_digits(monkeypatch):
    monkeypatch.setattr(experiment, "DATASETS", {"digits": SMALL})


@pytest.mark.usefixtures("on_digits")
@pytest.mark.parametrize("name", [*METHODS, *REFERENCES, "no_quality"])
def test_every_method_gives_a_row(name):
    row = experiment.run(Job(name, "digits", 0.2, N_VAL, 0), None)
    assert tuple(row) == COLUMNS
    assert 0.1 < row["scratch_accuracy"] <= 1
    assert 0 <= row["scratch_f1"] <= 1
    if name in REFERENCES:
        assert math.isnan(row["run_accuracy"])
        assert row["scratch_steps"] == (240 if name == "full_long" else 60)
        return
    # At most 5% of 1,347 rows are held out, and the rest is dealt out to six sources.
    assert row["selected"] == round(0.2 * 6 * ((1347 - 67) // 6))
    assert 0.1 < row["run_accuracy"] <= 1
    assert (row["warmup_s"] > 0) == (name == "data_shapley")


@pytest.mark.usefixtures("on_digits")
def test_what_selects_once_begins_with_the_samples_that_it_was_trained_on():
    problem = experiment.problem_of(Job("data_shapley", "digits", 0.2, N_VAL, 0), None)
    method = METHODS["data_shapley"]
    seen = []

    class Watching(experiment.DVCDataModule):
        def setup(self, stage):
            super().setup(stage)
            seen.append(self.selected_ids.tolist())

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(experiment, "DVCDataModule", Watching)
        experiment._from_selection(problem, method, seed=0)
    warm, everything = seen
    assert warm == everything
    assert len(warm) == math.ceil(0.1 * 256)


@pytest.mark.parametrize("table", ["table1", "table2", "table3"])
def test_methods_that_a_table_does_not_have_are_refused(table, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["paper", table, "--methods", "DVC"])
    with pytest.raises(SystemExit):
        main()
    assert f"expected methods of {table} among [" in capsys.readouterr().err


@pytest.mark.usefixtures("on_digits")
@pytest.mark.parametrize(("tuning", "n_judged"), [(False, 450), (True, 1347 // 5)])
def test_a_model_is_judged_on_test_rows_or_on_held_out_ones(tuning, n_judged):
    row = experiment.runner(None, tuning)(Job("full", "digits", 1.0, N_VAL, 0))
    n_right = n_judged * row["scratch_accuracy"]
    assert n_right == pytest.approx(round(n_right), abs=1e-3)


@pytest.mark.usefixtures("on_digits")
@pytest.mark.parametrize("options", [[], ["--held-out"]])
def test_a_command_judges_on_what_it_is_told_to(options, tmp_path, monkeypatch):
    """Nothing is run here but what the command would have given to its processes."""
    seen = []

    def instead(jobs, run, *_):
        seen.append(run)
        return [a_row(COLUMNS, jobs[0])]

    monkeypatch.setattr("examples.paper.__main__.run_all", instead)
    common = ["table1", "--datasets", "wine", "--methods", "full", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["paper", *common, *options])
    main()
    row = seen[0](Job("full", "digits", 1.0, N_VAL, 0))
    n_right = (1347 // 5 if options else 450) * row["scratch_accuracy"]
    assert n_right == pytest.approx(round(n_right), abs=1e-3)


def test_a_report_of_nothing_is_refused(tmp_path, monkeypatch, capsys):
    for table in ("table1", "table3"):
        arguments = ["paper", table, "--only-report", "--folder", str(tmp_path / "none")]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit):
            main()
        assert "expected finished runs in " in capsys.readouterr().err


def test_more_validation_samples_than_there_are_rows_are_refused():
    with pytest.raises(ValueError, match="there are 1347, but got 1347"):
        deal_out(datasets.digits(), 0, n_val=1347, budget=0.1)


def a_row(columns, job):
    return dict.fromkeys(columns, "0.5") | {k: str(v) for k, v in job._asdict().items()}


def written(path, row):
    path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")


def test_what_held_out_rows_tell_is_kept_apart(tmp_path, monkeypatch, capsys):
    written(
        tmp_path / "table2_held_out.csv", a_row(COLUMNS, next(jobs_of("table2", [0], ["mnist"])))
    )
    arguments = ["paper", "table2", "--only-report", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--held-out"])
    main()
    assert "50.0" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        main()
    monkeypatch.setattr("sys.argv", ["paper", "table3", "--held-out"])
    with pytest.raises(SystemExit):
        main()
    assert "no --held-out with table3" in capsys.readouterr().err


def test_what_a_gpu_ran_is_kept_apart_from_what_a_cpu_did(tmp_path, monkeypatch, capsys):
    written(tmp_path / "table3_gpu.csv", a_row(scale.COLUMNS, next(scale.jobs_of([3000], [0]))))
    arguments = ["paper", "table3", "--only-report", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--accelerator", "gpu"])
    main()
    assert "| 3000 | full |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        main()


def test_a_table_is_made_of_all_its_cells():
    jobs = list(jobs_of("table1", [0, 1], ["mnist", "wine"]))
    assert len(jobs) == len(set(jobs)) == 2 * 2 * (3 + 4 * 10)
    usual = Counter(job.dataset for job in jobs_of("table1", None, ["mnist", "wine"]))
    assert usual == {"mnist": 5 * (3 + 4 * 10), "wine": 40 * (3 + 4 * 10)}
    assert len(list(jobs_of("sizes", [0], list(experiment.DATASETS)))) == 3 * 3 * (1 + 2 * 10)
    assert len(list(jobs_of("table2", [0], list(experiment.DATASETS)))) == 4 * len(PARTS)
    assert len(list(scale.jobs_of([10, 20], [0]))) == 2 * (1 + 3 * 3)


def fake_rows():
    """Random gets 0.6, DVC 0.75, the clean samples 0.8; of two seeds, 0.01 more and less."""
    accuracy = {"random": 0.6, "dvc": 0.75, "clean": 0.8, "full": 0.7}
    rows = {}
    for name, seed, budget in product([*METHODS, *REFERENCES], (0, 1), BUDGETS):
        job = Job(
            name, "wine", 1.0 if name in ("validation", "full", "full_long") else budget, 500, seed
        )
        middle = accuracy.get(name, 0.5)
        row = dict.fromkeys(COLUMNS, "nan") | {k: str(v) for k, v in job._asdict().items()}
        row |= {"scratch_accuracy": str(middle + (0.01 if seed else -0.01))}
        row |= {"selection_s": "1.0", "warmup_s": "0.0", "training_s": "3.0"}
        rows[job_of(row)] = row
    return rows


def test_reports_say_what_the_rows_do(tmp_path):
    rows = fake_rows()
    text = report.table1(rows)
    assert "| DVC | 75.0 ± 1.4 (55.5) |" in text  # in brackets, the paper's
    assert "| *whole pool* | 70.0 ± 1.4 |" in text
    assert "DVC is first in 4 of 4 cells; it closes 75% on average, 75% at least." in text
    assert "| DVC | 1.0 | 0.0 | 3.0 | 25% |" in text
    for name, draw in report.PLOTS.items():
        draw(rows, tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size > 10_000


def test_seconds_are_of_cells_not_of_runs():
    """Nine short runs of one data set count no more than one long run of another."""
    rows = {}
    for name, n_seeds, spent in (("wine", 9, "1"), ("mnist", 1, "5")):
        for seed in range(n_seeds):
            columns = dict.fromkeys(("selection_s", "warmup_s", "training_s"), spent)
            rows[Job("dvc", name, 0.1, N_VAL, seed)] = columns
    assert "| DVC | 3.0 | 3.0 | 3.0 | 67% |" in report.seconds(rows)


def test_methods_are_compared_over_the_seeds_that_all_have():
    """A seed that only DVC has, and in which it is perfect, does not make it better."""
    rows = fake_rows()
    more = {job._replace(seed=2): row for job, row in rows.items() if job.method == "dvc"}
    rows |= {job: {**row, "seed": "2", "scratch_accuracy": "1.0"} for job, row in more.items()}
    means = report.means_of(rows, ["random", "dvc", "clean"], "wine", 0.1)
    assert means == pytest.approx({"random": 0.6, "dvc": 0.75, "clean": 0.8})
    assert report.closed(means, "dvc") == pytest.approx(0.75)
    assert "closes 75% on average" in report.summary(rows)
    assert "| 75% ± 0% |" in report.summary(rows)


def test_the_share_closed_has_a_jackknife_error_and_missing_methods_are_left_out():
    # Gains of 1, 1 and 4 over gaps of 2, 4 and 6: without one seed 5/10, 5/8 and 2/6.
    rows = {}
    for name, values in (("random", (1, 2, 3)), ("dvc", (2, 3, 7)), ("clean", (3, 6, 9))):
        for seed, value in enumerate(values):
            rows[Job(name, "wine", 0.1, N_VAL, seed)] = {"scratch_accuracy": str(value / 10)}
    left = np.array([5 / 10, 5 / 8, 2 / 6])
    error = (2 / 3 * ((left - left.mean()) ** 2).sum()) ** 0.5
    expected = f"| wine 10% | 40.0% | Random 20.0% | - | 60.0% | - | - | 50% ± {error:.0%} |"
    assert expected in report.summary(rows)


def test_scale_is_told_and_drawn(tmp_path):
    rows = {}
    for number, job in enumerate(scale.jobs_of([10, 20], [0, 1])):
        rows[job] = {"accuracy": "0.5", "selection_s": "1.0", "training_s": str(number)}
    assert "| 10 | dvc | 10% | 50.0 ± 0.0 |" in report.table3(rows)
    report.draw_table3(rows, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 10_000


def test_differences_of_metrics_are_taken_seed_by_seed():
    rows = {}
    for name, gain in (("all_six", 0.0), ("no_quality", -0.02)):
        for seed in range(3):
            job = Job(name, "mnist", 0.2, N_VAL, seed)
            rows[job] = {"scratch_accuracy": str(0.9 + seed / 50 + gain)}
    # Seeds that only one of them has, the first of one and the last of the other.
    del rows[Job("all_six", "mnist", 0.2, N_VAL, 0)]
    rows[Job("all_six", "mnist", 0.2, N_VAL, 3)] = {"scratch_accuracy": "0.1"}
    text = report.table2(rows)
    assert "| no_quality | 90.0 ± 2.0 | -2.00 ± 0.00 |" in text


def test_differences_of_variants_are_over_the_runs_that_both_have():
    done = {}
    for seed, dataset, (name, gain) in product(
        range(3), ("mnist", "wine"), (("random", 0.0), ("clean", 0.2), ("defaults", 0.1))
    ):
        done[ablation.Job(name, dataset, 0.1, 500, seed)] = ablation.Row(0.5 + gain)
        done[ablation.Job("no take-back", dataset, 0.1, 500, seed)] = ablation.Row(0.58)
    # A run and a seed that only one has, in which it is perfect.
    done[ablation.Job("no take-back", "mnist", 0.1, 500, 0)] = ablation.Row(0.7)
    del done[ablation.Job("defaults", "mnist", 0.1, 500, 0)]
    for name, accuracy in (("random", 0.5), ("clean", 0.7), ("no take-back", 0.7)):
        done[ablation.Job(name, "mnist", 0.1, 500, 3)] = ablation.Row(accuracy)
    (line,) = (line for line in ablation.table(done).split("\n") if "no take-back" in line)
    assert line.endswith("| -10% ± 0% |")


@pytest.mark.parametrize("size", scale.SIZES.values(), ids=scale.SIZES)
def test_the_proxy_is_smaller_than_what_it_selects_for(size):
    x = torch.randn(2, 3 * 32 * 32)
    proxy, large = size.proxy(10), size.large(10)
    assert proxy(x).shape == large(x).shape == (2, 10)
    numbers = [sum(p.numel() for p in net.parameters()) for net in (proxy, large)]
    assert numbers[1] > 30 * numbers[0]


@pytest.mark.parametrize(
    ("make", "n_parameters", "n_layers"), [("resnet8", 78_042, 8), ("resnet18", 11_173_962, 18)]
)
def test_residual_networks_are_those_of_the_literature(make, n_parameters, n_layers):
    """The usual ResNet-18 for CIFAR-10 has as many; layers beside a block do not count."""
    net = getattr(networks, make)(10)
    assert sum(p.numel() for p in net.parameters()) == n_parameters
    layers = [m for name, m in net.named_modules() if "beside" not in name]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in layers) == n_layers
    assert net(torch.randn(2, 3 * 32 * 32)).shape == (2, 10)


def shifted(image, down, across, is_mirrored):
    """What a window so far down and across sees of an image with a grey margin of 4 pixels."""
    wide = torch.zeros(3, 40, 40)
    wide[:, 4:36, 4:36] = image
    seen = wide[:, down : down + 32, across : across + 32]
    return seen.flip(2) if is_mirrored else seen


def test_a_pool_is_filled_up_with_shifted_and_mirrored_copies():
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([5, 6, 7])
    features, found = scale.more_of(images.flatten(1), labels, 8, seed=0)
    assert found.tolist() == [5, 6, 7, 5, 6, 7, 5, 6]
    assert torch.equal(features[:3], images.flatten(1))
    ways = list(product(range(9), range(9), (False, True)))
    taken = []
    for number in range(3, 8):
        copy = features[number].view(3, 32, 32)
        taken += [w for w in ways if torch.equal(shifted(images[number % 3], *w), copy)]
    assert len(taken) == 5
    assert len(set(taken)) > 1
    assert {is_mirrored for *_, is_mirrored in taken} == {False, True}


def test_no_held_out_image_is_in_a_pool_of_copies(monkeypatch):
    x = torch.arange(1.0, 901.0)[:, None].expand(900, 3072)  # told apart by their colour
    data = datasets.Data(x, torch.arange(900) % 10, 10, n_train=800)
    monkeypatch.setitem(datasets.LOADERS, "cifar10", lambda folder: data)
    scale._loaded.cache_clear()
    scale.problem_of.cache_clear()
    problem = scale.problem_of(900, 0, None, "cpu")
    clean = problem.parts["clean"]
    colours = clean.features.amax(1)
    assert len(problem.val) == N_VAL
    assert len(problem.is_clean) == 900
    assert not set(colours.tolist()) & set(problem.val.tensors[0][:, 0].tolist())
    assert colours.max() <= 800
    assert torch.equal((colours.long() - 1) % 10, clean.labels)
    scale._loaded.cache_clear()
    scale.problem_of.cache_clear()


# --- where the data come from ------------------------------------------------------------------


@pytest.fixture
def openml(monkeypatch):
    """What OpenML would send, by name: a network is needed for the real thing."""
    sent = {}
    monkeypatch.setattr(
        sklearn.datasets, "fetch_openml", lambda name, version, **settings: sent[name, version]
    )
    return sent


def test_wine_is_the_same_from_openml(openml):
    rng = np.random.default_rng(0)
    for name, n in (("red", 600), ("white", 700)):
        classes = np.array(list("1234567" * n))[:n]
        openml[f"wine-quality-{name}", 1] = rng.normal(size=(n, 11)), classes
    data = datasets.wine()
    assert data.features.shape == (1300, 12)
    assert (data.n_train, data.n_classes) == (300, 7)
    assert torch.bincount(data.labels).tolist() == [186] * 5 + [185] * 2


@pytest.mark.parametrize("first", [7841, 7840])
def test_adult_is_taken_in_its_original_order_only(openml, first):
    rows = np.random.default_rng(0).integers(0, 3, size=(32_561 + 16_281, 14)).astype(float)
    rows[0, 1] = np.nan  # a missing category is one of its own
    labels = np.array(["<=50K"] * len(rows), dtype=object)
    labels[:first] = ">50K"
    openml["adult", 2] = rows, labels
    if first != 7841:
        with pytest.raises(ValueError, match="rows of adult in their original order"):
            datasets.adult()
        return
    data = datasets.adult()
    assert data.features.shape == (48_842, 6 + 8 * 3)
    assert int(data.labels.sum()) == first
