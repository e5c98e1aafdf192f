"""What the papers published, as data: each figure with the experiment, the case, the method and where it stands."""

from __future__ import annotations

from typing import NamedTuple

PAPER_2020 = "2020 paper"
PAPER_2019 = "2019 paper"


class Figure(NamedTuple):
    """A published figure.

    Attributes:
        experiment, case: where it belongs here; a case is a data set or a net.
        method: the name in `runs.METHODS` of the method that it speaks of.
        metric: the row's entry that it can stand beside: ``test_loss`` or ``svm_accuracy`` (a fraction).
        value: the figure.
        setting: the learning rate or momentum that is published with it, as text.
        source: paper and table.
    """

    experiment: str
    case: str
    method: str
    metric: str
    value: float
    setting: str
    source: str


def _loss_table(experiment: str, rows: list[tuple[str, str, float]], source: str) -> list[Figure]:
    return [Figure(experiment, "mnist", method, "test_loss", value, setting, source) for method, setting, value in rows]


def _pairs(experiment: str, metric: str, rows: list[tuple[str, float, float]], source: str) -> list[Figure]:
    """Figures of DANTE and of SGD, case by case."""
    return [
        Figure(experiment, case, method, metric, value, "", source)
        for case, dante, sgd in rows
        for method, value in (("dante", dante), ("sgd", sgd))
    ]


FIGURES = (
    *_loss_table(
        "table1",
        [
            ("dante", "lr 0.001", 0.030775),
            ("sgd", "lr 0.001", 0.031126),
            ("adam", "0.0001", 0.021704),
            ("adagrad", "0.0001", 0.021896),
            ("rmsprop", "0.0001", 0.021953),
            ("sgd-heavy", "momentum 0.9", 0.021497),
            ("dante-heavy", "momentum 0.0005", 0.020816),
        ],
        f"{PAPER_2020}, Table 1",
    ),
    *_loss_table(
        "table2",
        [
            ("dante", "lr 0.001", 0.030775),
            ("sgd", "lr 0.001", 0.031126),
            ("alternating-sgd", "lr 0.001", 0.032912),
            ("alternating-sgd", "lr 0.0001", 0.044911),
            ("alternating-sgd", "lr 0.0005", 0.035567),
        ],
        f"{PAPER_2020}, Table 2",
    ),
    *_loss_table(
        "table2",
        [
            ("sgd", "lr 0.0001", 0.031510),
            ("sgd", "lr 0.0005", 0.031346),
            ("sgd", "lr 0.005", 0.031263),
            ("sgd", "lr 0.1", 0.032676),
        ],
        f"{PAPER_2019}, Table 4",
    ),
    *_pairs(
        "table3",
        "test_loss",
        [("airfoil", 0.066852, 0.069338), ("fires", 0.024988, 0.029008), ("ccpp", 0.000283, 0.0003009)],
        f"{PAPER_2020}, Table 3",
    ),
    *_pairs(
        "table4",
        "svm_accuracy",
        [
            ("mnist", 0.936, 0.9244),
            ("ionosphere", 0.9245, 0.9622),
            ("svmguide4", 0.8765, 0.7037),
            ("usps", 0.9043, 0.8949),
            ("vehicle", 0.7702, 0.7480),
        ],
        f"{PAPER_2020}, Table 4",
    ),
)


def of(experiment: str, case: str, method: str, metric: str) -> list[Figure]:
    """The figures that were published for this, in the papers' order; none for most."""
    wanted = (experiment, case, method, metric)
    return [f for f in FIGURES if (f.experiment, f.case, f.method, f.metric) == wanted]
