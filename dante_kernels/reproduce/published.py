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


class Rival(NamedTuple):
    """A figure of a method that is not run here.

    Attributes:
        experiment, case: where it belongs here.
        title: the method, with what must be known of the run.
        accuracy: on the test rows, a fraction; None where it is not the figure.
        seconds: as text, with what they are of; empty where it is not the figure.
        source: where it stands.
    """

    experiment: str
    case: str
    title: str
    accuracy: float | None
    seconds: str
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


PUBLIC_CODE = "its public code"
FIGURE_8 = f"{PAPER_2020}, figure 8"
_DLAM_SECONDS = {  # an iteration on a GTX 1080 Ti, with rho = 1e-4 and 1, for a fifth of the rows, two, ... all
    "mnist": (11000, (0.1692, 0.3216, 0.5010, 0.7164, 0.9413), (0.7684, 1.4810, 2.2626, 3.0299, 3.7504)),
    "fashion-mnist": (12000, (0.2500, 0.5081, 0.8492, 1.1911, 1.5092), (0.8795, 1.6464, 2.5580, 3.4492, 4.2902)),
}
RIVALS = (
    *(Rival("mlp", f"mnist 784-{inner}-10", "ADMM (Taylor), its peak", 0.81, "", FIGURE_8) for inner in ("100", "100-100-100")),
    *(
        Rival("rivals", f"mnist {net}", title, accuracy, f"{cost} times SGD's", PUBLIC_CODE)
        for net, title, accuracy, cost in (
            ("784-100-10", "AM-Adam, batch norm, 1 epoch", 0.955, "3.1"),
            ("784-100-10", "AM-Adam, batch norm, 10 epochs", 0.974, "3.1"),
            ("784-100-10", "AM-Adam, batch norm, 50 epochs", 0.9783, "3.1"),
            ("784-100-10", "block coordinate descent, 50 sweeps", 0.859, "5-6"),
            ("784-100-10", "ADMM (Taylor), a port, 10,000 rows, 80 warm + 15 sweeps (others diverge)", 0.811, "37"),
            ("784-100-100-10", "AM-Adam, batch norm, 1 epoch", 0.968, "4.3"),
            ("784-100-100-10", "AM-Adam, batch norm, 10 epochs", 0.983, "4.3"),
            ("784-100-100-10", "AM-Adam, batch norm, 50 epochs", 0.9833, "4.3"),
            ("784-100-100-10", "AM-Adam, 20 epochs", 0.9732, "4.2"),
            ("784-100-100-10", "dlADMM, 79 iterations", 0.802, "13-23"),
            ("784-100-100-10", "DLAM (mDLAM), 30 iterations", 0.703, "10 (as published 36)"),
            ("784-100-100-10", "DLAM (mDLAM), 100 iterations", 0.772, "10 (as published 36)"),
            ("784-100-100-10", "DLAM (mDLAM), 150 iterations", 0.7987, "10 (as published 36)"),
            ("784-100-100-10", "block coordinate descent, 50 sweeps", 0.844, "5-6"),
        )
    ),
    *(
        Rival("rivals", f"mnist 784-{units}-{units}-10", "DLAM, 150 iterations, as plotted, or more", 0.8, "", "DLAM, figure 3")
        for units in (100, 500)
    ),
    *(
        Rival("rivals", f"{data} {fifth * number}", f"DLAM, rho = {rho}", None, f"{seconds:.4f}", "DLAM, Table 2")
        for data, (fifth, small, large) in _DLAM_SECONDS.items()
        for rho, column in (("1e-4", small), ("1", large))
        for number, seconds in enumerate(column, 1)
    ),
)


def of(experiment: str, case: str, method: str, metric: str) -> list[Figure]:
    """The figures that were published for this, in the papers' order; none for most."""
    wanted = (experiment, case, method, metric)
    return [f for f in FIGURES if (f.experiment, f.case, f.method, f.metric) == wanted]


def rivals(experiment: str, case: str) -> list[Rival]:
    """The figures of methods that are not run here."""
    return [rival for rival in RIVALS if (rival.experiment, rival.case) == (experiment, case)]
