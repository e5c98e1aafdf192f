"""The study of the defaults: what its rows over small tables are of, and which of its trainings it chooses."""

from support_reproduce import write_ccpp

import dante_kernels as dk
from bench import defaults_long, defaults_uci
from bench.defaults_rows import case
from dante_kernels.reproduce import problems, runs

CCPP = ("ccpp", "4-100-1", "leaky_relu", "mse")


def test_a_small_table_at_the_default_rate_is_fit_with_nothing_set(tmp_path):
    write_ccpp(tmp_path)
    row = defaults_uci.train(case(*CCPP, "dante", 0.003, 1), tmp_path)
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


def test_a_longer_training_is_chosen_by_the_held_out_accuracy():
    rows = [
        case(*defaults_long.NET, "dante", rate, 0, **settings) | {"validation_accuracy": 0.9 + 0.01 * (i == 1)}
        for i, (rate, settings) in enumerate(defaults_long.CHOICES)
    ]
    assert defaults_long.chosen(rows) == defaults_long.CHOICES[1]
    finals = [row for row in defaults_long.cases(rows) if row["settings"].get("rows") == "all" and row["method"] == "dante"]
    assert finals[-1]["settings"] == defaults_long.CHOICES[1][1] | {"rows": "all"}
