"""The study of the defaults: what its rows over small tables are of, and which of its trainings it chooses."""

import pytest
from support_reproduce import write_ccpp

import dante_kernels as dk
from bench import defaults, defaults_changes, defaults_long, defaults_uci, gpu_seconds
from bench.defaults_rows import case, usual
from dante_kernels import data
from dante_kernels.kernels import cost, plan
from dante_kernels.reproduce import problems, runs
from dante_kernels.training import schedules

CCPP = ("ccpp", "4-100-1", "leaky_relu", "mse")


def test_a_small_table_at_the_default_rate_is_fit_with_nothing_set(tmp_path):
    write_ccpp(tmp_path)
    row = defaults_uci.train(case(*CCPP, "dante", 0.004, 1, **defaults_uci.SETTINGS["dante"]), tmp_path)
    problem = problems.load(problems.Spec("ccpp", split=1), tmp_path)
    model = runs.build((4, 100, 1), "leaky_relu", "identity", 1)
    dk.fit(model, problem.x, problem.y, seed=1)
    loss, _ = runs.evaluate(model, problem.x_test, problem.y_test, "mse")
    assert row["test_loss"] == loss * problem.unit
    assert row["validation_loss"] != row["test_loss"]


def test_a_rate_that_diverges_with_one_split_is_not_the_best():
    results = {0.1: [0.1] * 4 + [None], 0.03: [0.2] * 5}
    rows = [
        case(*CCPP, "sgd", rate, seed) | {"validation_loss": 1 - rate, "test_loss": loss, "mean_loss": 1.0}
        for rate, losses in results.items()
        for seed, loss in enumerate(losses)
    ]
    assert "0.03: 0.2 ± 0" in defaults_uci.table(rows)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("activation", ["leaky_relu", "sigmoid"])
def test_the_usual_settings_are_those_of_fit_with_nothing_set(monkeypatch, activation, loss):
    monkeypatch.setattr(defaults, "EPOCHS", 2)
    digits = data.load_digits()
    rate, settings = usual("64-30-30-10", activation, loss)
    row = defaults.train(case("digits", "64-30-30-10", activation, loss, "dante", rate, 0, **settings), digits)
    model = runs.build((64, 30, 30, 10), activation, activation if loss == "mse" else "identity", 0)
    kept = len(digits.x_train) * 5 // 6
    dk.fit(model, digits.x_train[:kept], digits.y_train[:kept], loss=loss, schedule=schedules.usual(2, parallel=True))
    assert row["test_loss"] == runs.evaluate(model, digits.x_test, digits.y_test, loss)[0]


def test_a_longer_training_is_chosen_by_the_held_out_accuracy():
    rows = [
        case(*defaults_long.NET, "dante", rate, 0, **settings) | {"validation_accuracy": 0.9 + 0.01 * (i == 1)}
        for i, (rate, settings) in enumerate(defaults_long.CHOICES)
    ]
    assert defaults_long.chosen(rows) == defaults_long.CHOICES[1]
    finals = [row for row in defaults_long.cases(rows) if row["settings"].get("rows") == "all" and row["method"] == "dante"]
    assert finals[-1]["settings"] == defaults_long.CHOICES[1][1] | {"rows": "all"}


def test_the_table_of_changes_has_ratios_of_means_over_the_seeds():
    grid = ("mnist", "784-100-10", "leaky_relu", "mse")
    rows = []
    for other in defaults_changes.GRIDS:
        for name, (rate, settings) in defaults_changes.changes(*other[1:]).items():
            losses = (
                (1.0, 2.0, 3.0)
                if name == "nothing"
                else (1.0, 1.0, 2.5)
                if (other, name) == (grid, "blocks of 5")
                else (2.0,) * 3
            )
            rows += [case(*other, "dante", rate, seed, **settings) | {"test_loss": loss} for seed, loss in enumerate(losses)]
    first, second = (table.splitlines() for table in defaults_changes.tables(rows).split("\n\n"))
    column = [cell.strip() for cell in first[0].split("|")].index("mnist, mse, 784-100-10")
    found = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in first[2:]}
    assert found["nothing"] == "2.0000 ± 50 %"
    assert found["blocks of 5"] == "0.75"
    assert {ratio for name, ratio in found.items() if name not in ("nothing", "blocks of 5")} == {"1.00"}
    assert len(first) - len(second) == 3  # the bounds


def test_the_passes_to_an_accuracy_are_those_of_the_shortest_training_that_comes_to_it(monkeypatch):
    monkeypatch.setattr(gpu_seconds, "TARGETS", {"64-12-10": 0.9})
    ways, rows = (("dante", "mse", None), ("sgd", "mse", 1.0)), []
    monkeypatch.setattr(gpu_seconds, "WAYS", {"64-12-10": ways})
    comes = {"dante": {4: 0.8, 6: 0.91}, "sgd": dict.fromkeys(gpu_seconds.PASSES, 0.89)}
    for net, way, passes, seed in gpu_seconds.missing(rows, ["64-12-10"]):
        accuracy = comes[way[0]][passes] + 0.001 * seed
        names = ("net", "method", "loss", "rate", "passes", "seed", "test_accuracy")
        rows.append(dict(zip(names, (net, *way, passes, seed, accuracy), strict=True)))
    assert [gpu_seconds.enough(rows, "64-12-10", way) for way in ways] == [6, None]
    assert len(rows) == 3 * (2 + len(gpu_seconds.PASSES))
    ours, theirs = gpu_seconds.table(rows).splitlines()[2:]
    steps = 600 * gpu_seconds.microseconds("64-12-10", "dante", "highest") / 1000
    assert ours.startswith(f"| 64-12-10, 90 % | DANTE, MSE | 6 | 91.10 ± 0.10 % | {6 * steps:.0f} |")
    plain = 600 * gpu_seconds.microseconds("64-12-10", "sgd", "highest") / 1000
    assert theirs.startswith(f"| 64-12-10, 90 % | SGD with momentum, MSE, 1 | > 16 | 89.10 ± 0.10 % | > {16 * plain:.0f} |")


@pytest.mark.parametrize("way", gpu_seconds.WAYS["784-100-10"])
def test_a_training_to_an_accuracy_learns(way):
    row = gpu_seconds.train("64-30-10", way, 12, 1, data.load_digits())
    assert row["test_accuracy"] > 0.7
    assert (row["net"], row["method"], row["loss"], row["rate"], row["passes"], row["seed"]) == ("64-30-10", *way, 12, 1)


def test_a_step_of_every_layer_has_its_part_of_a_block(monkeypatch):
    widths = (784, 400, 200, 100, 10)
    shapes = [plan.Shape(widths[i:], 100, momentum=True) for i in range(4)]
    steps = sum(plan.choose(shape, plan.H200, 132).microseconds for shape in shapes)
    assert gpu_seconds.microseconds("784-400-200-100-10", "dante", "highest") == pytest.approx(
        steps + 4 * cost.block(shapes[0], 20, plan.H200) / 20
    )
    assert plan.blocks(plan.Shape((784, 100, 10), 100, momentum=True), 20, 132) is None
    round_ = plan.blocks(plan.Shape((784, 100, 10), 100, momentum=True), 2, 132)
    monkeypatch.setitem(gpu_seconds.BLOCKS, "parallel", {"inner_steps": 2})
    assert gpu_seconds.microseconds("784-100-10", "parallel", "highest") == pytest.approx(2 * round_.microseconds)
