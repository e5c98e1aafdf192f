"""Which trainings each of the papers' experiments is made of, small or as published, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .problems import Spec
from .runs import METHODS, Method
from .search import Case

ONE_HIDDEN = ((784, 100, 10), (784, 250, 10), (784, 400, 10), (784, 600, 10))
TWO_HIDDEN = (784, 400, 200, 10)
THREE_HIDDEN = (784, 400, 200, 100, 10)
FIVE_HIDDEN = (784, 600, 400, 200, 100, 50, 10)
FIGURE_8 = (784, 100, 100, 100, 10)
RIVALS = (("mnist", (784, 100, 10)), ("mnist", (784, 100, 100, 10)), ("fashion-mnist", (784, 100, 100, 10)))
NETS = (*ONE_HIDDEN, TWO_HIDDEN, THREE_HIDDEN, FIVE_HIDDEN)
WIDE_10 = ((3072, 512, 10), (3072, 512, 64, 10), (3072, 1024, 512, 256, 128, 64, 10))
WIDE_200 = ((12288, 3072, 512, 200), (12288, 3072, 1024, 512, 200), (12288, 3072, 1536, 768, 384, 200))

# What a quick run has of them, and of the rows of pictures.
QUICK_ROWS = 3000
QUICK = {
    "mnist": (*NETS, FIGURE_8),
    "fashion-mnist": ((784, 100, 10), THREE_HIDDEN),
    "kmnist": ((784, 100, 10), THREE_HIDDEN),
}

# The papers' claims, at equal numbers of weights updated: the first is at least as good as the second.
PAIRS = (
    ("dante", "sgd"),
    ("dante-short", "sgd-cosine"),
    ("dante-heavy", "sgd-heavy"),
    ("dante-heavy", "adam"),
    ("dante-heavy", "adagrad"),
    ("dante-heavy", "rmsprop"),
    ("dante", "alternating-sgd"),
    ("dante-stacked", "sgd"),
    ("dante-tuned", "sgd"),
)
FOUR = tuple(METHODS[name] for name in ("dante", "sgd", "dante-short", "sgd-cosine"))


@dataclass(frozen=True)
class Experiment:
    """One of the papers' experiments.

    Attributes:
        name, title, source: what it is called here and where it is published.
        text: what was chosen and what must be known to read the figures, in Markdown.
        cases: its trainings.
        metric: the entry of a row that decides: ``test_loss`` (less is better), ``test_accuracy`` or ``svm_accuracy``.
        picture: ``"curves"``, ``"widths"`` or ``"reconstructions"``; None for no picture.
    """

    name: str
    title: str
    source: str
    text: str
    cases: tuple[Case, ...]
    metric: str = "test_loss"
    picture: str | None = "curves"


@dataclass(frozen=True)
class Scale:
    """How large an experiment is run: quick (minutes on two cores) or full (as published, hours)."""

    full: bool

    def pick(self, quick: int, full: int) -> int:
        """The number for this scale."""
        return full if self.full else quick

    @property
    def rows(self) -> int | None:
        """Training rows of pictures at most."""
        return None if self.full else QUICK_ROWS

    def seeds(self, quick: int = 2) -> tuple[int, ...]:
        """Of the final trainings."""
        return tuple(range(1, self.pick(quick, 5) + 1))

    @property
    def splits(self) -> tuple[int, ...]:
        """Of the small tables, in quick runs too."""
        return tuple(range(1, self.pick(5, 10) + 1))

    @property
    def rates(self) -> int:
        """How many rates a search begins with."""
        return self.pick(2, 5)

    @property
    def most(self) -> int:
        """How many rates a search tries at most."""
        return self.pick(6, 9)


def _mlp(scale: Scale) -> Experiment:
    cases = []
    for data in ("mnist", "fashion-mnist", "kmnist"):
        chosen = (*NETS, FIGURE_8) if scale.full else QUICK[data]
        cases += [_net(scale, data, widths) for widths in chosen]
    for data, nets in (("cifar10", WIDE_10), ("svhn", WIDE_10), ("tiny-imagenet", WIDE_200)):
        for widths in nets:
            case = _net(scale, data, widths)
            rows = scale.pick(2000, 20000) if data == "tiny-imagenet" else scale.rows
            cases.append(replace(case, spec=replace(case.spec, rows=rows), epochs=10, seeds=scale.seeds()[:3]))
    for widths in (*WIDE_10, *WIDE_200):
        name = f"synthetic-{widths[0]}-{widths[-1]}"
        cases.append(
            Case(
                f"{name} {'-'.join(map(str, widths))}", "random rows, for speed only", Spec(name, scale.pick(500, 5000), 100),
                widths, FOUR[2:], epochs=1, speed_only=True,
            )
        )  # fmt: skip
    text = """Leaky ReLU (0.01 and 1) after every layer, MSE against one-hot rows, mini-batches of 100, pixels scaled to
[0, 1]. The papers give neither the mini-batch of these nets nor final figures, only plots. Of KMNIST the first 7,000 training
images do where there are no more. 784-100-100-100-10 is the second net of figure 8; more of its rivals are in the section on
other alternating methods. docs/defaults.md has most of these nets on 50,000 rows, with what `dk.fit` takes where nothing is
set, and beside a plain prototype; the rate of the short blocks is searched here as all others are. With one hidden layer the
outer layer goes first here (Algorithm 2).
The wide nets need the user's own files of CIFAR-10, SVHN and Tiny ImageNet; on random rows only their seconds mean anything,
and those are of trainings side by side, no benchmark."""
    return Experiment("mlp", "Feedforward nets, MSE", "2020 paper, figures 2 to 4 and 8", text, tuple(cases))


def _rivals(scale: Scale) -> Experiment:
    both = (METHODS["dante-short"], METHODS["sgd-cosine"])
    wide = tuple((data, (784, 500, 500, 10)) for data in ("mnist", "fashion-mnist"))

    def case(data: str, widths: tuple[int, ...], rows: int | None = None, **settings: object) -> Case:
        made = _net(scale, data, widths, methods=both, activation="relu", loss="cross_entropy", shift=-1)
        return replace(made, spec=Spec(data, rows), **settings)  # type: ignore[arg-type]

    cases = [case(data, widths, scale.rows, seeds=scale.seeds(3)) for data, widths in (*RIVALS, *(wide))]
    for data, fifth in (("mnist", 11000), ("fashion-mnist", 12000)):
        for rows in range(fifth, 5 * fifth + 1, fifth):
            name, title = f"{data} {rows}", f"{data}, {rows:,} rows, for speed only"
            cases.append(case(data, (784, 100, 100, 10), rows, name=name, title=title, epochs=1, seeds=(1,), speed_only=True))
    text = """ReLU, cross-entropy, mini-batches of 100; in a quick run few training rows, where the others' figures are of all
of them: docs/defaults.md has DANTE's on 50,000, with leaky ReLU. The rate is chosen by the held-out rows' loss.
The other methods are not run here: their figures are the papers', or those of their public code on all rows, one
seed each, with its cost in times of SGD's on one thread of a CPU. What is not the same besides: DLAM and ADMM take all rows as
one batch, AM-Adam has batch norm where that is said, block coordinate descent MSE, and DLAM's MNIST has 196 features.
In the lines for speed only, a pass in mini-batches in which every layer is trained stands beside an iteration of DLAM, which
updates every layer once: DLAM's seconds are those published, of a GTX 1080 Ti, ours of one thread of a CPU, side by side."""
    source = "2020 paper, figure 8; DLAM, figures 2 and 3 and Table 2"
    return Experiment("rivals", "Other alternating methods", source, text, tuple(cases), metric="test_accuracy", picture=None)


def _net(scale: Scale, data: str, widths: tuple[int, ...], **settings: object) -> Case:
    net = "-".join(map(str, widths))
    case = Case(
        f"{data} {net}",
        data,
        Spec(data, scale.rows),
        widths,
        FOUR,
        epochs=scale.pick(10, 50),
        seeds=scale.seeds(),
        rates=scale.rates,
        most=scale.most,
    )
    return replace(case, **settings)  # type: ignore[arg-type]


def _sigmoid(scale: Scale) -> Experiment:
    quick = (("mnist", (784, 100, 10)), ("mnist", TWO_HIDDEN), ("kmnist", (784, 100, 10)))
    full = tuple((data, widths) for data in ("mnist", "kmnist") for widths in NETS[:-1])
    cases = tuple(_net(scale, d, widths, activation="sigmoid", shift=2) for d, widths in (full if scale.full else quick))
    text = """As the feedforward nets, with the sigmoid after every layer, the last one too. No verdict is given where a method
has learnt nothing, its accuracy in every seed being at most three times that of a guess."""
    return Experiment("sigmoid", "Feedforward nets with sigmoid, MSE", "2020 paper, figure 5", text, cases)


def _cross_entropy(scale: Scale) -> Experiment:
    nets = NETS if scale.full else ((784, 100, 10), THREE_HIDDEN)
    cases = tuple(
        _net(
            scale, "mnist", widths, activation=activation, loss="cross_entropy", shift=-1,
            name=f"mnist {activation} {'-'.join(map(str, widths))}", title=f"mnist, {activation.replace('_', ' ')}",
        )
        for activation in ("leaky_relu", "sigmoid")
        for widths in nets
    )  # fmt: skip
    text = """As the feedforward nets, with cross-entropy on the logits of the last layer, which has no activation."""
    return Experiment("cross-entropy", "Feedforward nets, cross-entropy", "2020 paper, figure 6", text, cases)


def _autoencoder_case(scale: Scale, name: str, methods: tuple[Method, ...], hidden: int = 400, **settings: object) -> Case:
    case = Case(
        name, f"mnist 32 x 32, {hidden} hidden", Spec("mnist", scale.rows, side=32, autoencoder=True), (1024, hidden, 1024),
        methods, epochs=scale.pick(10, 50), batch=400, seeds=scale.seeds(), shift=2, rates=scale.rates, most=scale.most,
    )  # fmt: skip
    return replace(case, **settings)  # type: ignore[arg-type]


CANNOT_COMPARE = """What the published figures can and cannot be compared with: the one public early code of the authors (of the
2018 stage) does not normalize the weight's gradient. It normalizes the gradient with respect to the layer's input, applies the
weight's gradient as it is and accumulates gradients over the run; and the published rates are those of one such code for all
methods. SNGD here is Algorithm 1, a step of the length of the rate along the layer's whole gradient (weight and bias), so the
published 0.001 is no rate of the same thing. Compare the order of methods at their own best rates, and not the size of a
figure, which also depends on the number of epochs, on the loss's factor (here the mean over all pixels) and on the pixels'
scale, none of which is published."""
PREPARED = """Autoencoder 1024-400-1024, leaky ReLU after both layers, MSE, mini-batches of 400. Chosen here, since the
papers do not say: MNIST is enlarged to 32 x 32 by a border of zeros, pixels are scaled to [0, 1]; T is 5."""


def _table1(scale: Scale) -> Experiment:
    layerwise = ("dante", "dante-heavy", "dante-short", "dante-adam", "dante-adagrad", "dante-rmsprop")
    jointly = ("sgd", "sgd-heavy", "sgd-cosine", "adam", "adagrad", "rmsprop")
    case = _autoencoder_case(scale, "mnist", tuple(METHODS[name] for name in (*layerwise, *jointly)), seeds=scale.seeds(3))
    text = f"{PREPARED}\n{CANNOT_COMPARE}\n"
    text += "The published 0.0005 of DANTE's momentum would have no effect as a momentum; it is 0.9 here."
    return Experiment("table1", "Adaptive schemes", "2020 paper, Table 1", text, (case,))


def _table2(scale: Scale) -> Experiment:
    case = _autoencoder_case(
        scale, "mnist", tuple(METHODS[name] for name in ("dante", "alternating-sgd", "sgd")), seeds=scale.seeds(3)
    )
    text = f"{PREPARED} What Table 1 says of comparing with the published figures holds here too: they come from another step."
    return Experiment("table2", "Plain SGD inside the alternation", "2020 paper, Table 2; 2019 paper, Table 4", text, (case,))


def _table3(scale: Scale) -> Experiment:
    def case(name: str, features: int, batch: int, epochs: int) -> Case:
        return Case(
            name, name, Spec(name), (features, 100, 1), FOUR, epochs=scale.pick(epochs, 200), batch=batch, output="identity",
            splits=scale.splits, shift=-2, rates=scale.rates, most=scale.most,
        )  # fmt: skip

    cases = (case("airfoil", 5, 50, 100), case("fires", 29, 50, 50), case("ccpp", 4, 100, 20))
    text = """The paper gives neither net, nor split, nor scaling. Chosen here: one hidden layer of 100 leaky ReLUs, a linear
output; mini-batches of 50 (CCPP 100); a fifth of the rows for testing, by a split of its own for every seed, each with its
own search of the rates; features and target standardized by the training rows. The error is then given in the unit in
which the published one can be an error: Airfoil's of the standardized target (0.067 is 1.8 dB; of a target divided by its
maximum it would be 36 dB); CCPP's of the target divided by its maximum (0.00028 is 8 MW; of the standardized target it would
be 0.3 MW, a tenth of what any method reaches); Fires' of ln(1 + area), as its source advises, divided by its maximum. The
maxima are of all rows.
"Without learning" is the error of answering with the training rows' mean. Two of the published columns cannot be compared even
so: in these units linear least squares has an error of 0.0444 on Fires and of 0.0000849 on CCPP, so that Fires' 0.025 and 0.029
are out of every method's reach here, and CCPP's 0.00028 is three times that of a straight line."""
    return Experiment("table3", "Regression", "2020 paper, Table 3", text, cases, picture=None)


def _table4(scale: Scale) -> Experiment:
    def case(name: str, features: int, hidden: int, batch: int, epochs: int, **settings: object) -> Case:
        spec = Spec(name, autoencoder=True)
        made = Case(
            name, name, spec, (features, hidden, features), FOUR, epochs=scale.pick(epochs, 100), batch=batch, shift=1,
            seeds=scale.seeds(5), probe="svm", rates=scale.rates, most=scale.most,
        )  # fmt: skip
        return replace(made, **settings)  # type: ignore[arg-type]

    mnist = case("mnist", 784, scale.pick(200, 600), scale.pick(100, 500), 10)
    cases = (
        replace(mnist, spec=replace(mnist.spec, rows=scale.rows)),
        case("ionosphere", 34, 100, 20, 50, splits=scale.splits),
        case("svmguide4", 10, 100, 20, 50, splits=scale.splits),
        case("usps", 256, 100, 100, 10),
        case("vehicle", 18, 100, 20, 50, splits=scale.splits),
    )
    text = """The features are the hidden activations of an autoencoder with leaky ReLUs (0.01), trained to the least MSE; the
rate is chosen by the held-out rows' MSE, not by their classes. The paper gives neither the nets of these sets, nor splits, nor
the SVM's C. Chosen here: 100 hidden units (MNIST 600, as in 2018; 200 in a quick run); features scaled to [0, 1]; C = 1 on
standardized activations. USPS and MNIST have their own test rows. The published accuracies are whole numbers of 53 rows of
Ionosphere (15 %) and of 81 of the 300 of SVMGuide4, so many are drawn for testing, and 127 (15 %) of Vehicle's, where no
likely number fits; another split for every seed."""
    title, source = "Linear SVM on the features of an autoencoder", "2020 paper, Table 4"
    return Experiment("table4", title, source, text, cases, metric="svm_accuracy", picture=None)


def _t_sweep(scale: Scale) -> Experiment:
    dante = METHODS["dante"]
    lengths = [replace(dante, name=f"dante-T{t}", title=f"DANTE, T = {t}", inner_epochs=t) for t in (10, 5, 2, 1)]
    short = replace(dante, name="dante-20", title="DANTE, blocks of 20 steps", inner_steps=20)
    methods = (*lengths, short, METHODS["sgd"])
    cases = (
        _net(scale, "mnist", (784, 100, 10), methods=methods),
        _net(scale, "mnist", FIVE_HIDDEN if scale.full else THREE_HIDDEN, methods=methods),
    )
    text = """As the feedforward nets, all at a constant rate without momentum. The paper finds DANTE "fairly robust" to T and
takes 5; blocks shorter than a pass are not among what it tried.
Its second net is 784-600-400-200-100-50-10; a quick run takes a smaller one."""
    return Experiment("t-sweep", "The length of a block, T", "2020 paper, figure 7", text, cases)


def _widths(scale: Scale) -> Experiment:
    cases = tuple(
        _autoencoder_case(scale, f"mnist {hidden}", (METHODS["dante"], METHODS["sgd"]), hidden)
        for hidden in ((100, 200, 400, 600, 800) if scale.full else (50, 100, 400))
    )
    text = f"""{PREPARED.replace("400-1024", "N-1024")} The widths of the paper's plots are not in its
text. It finds SGD better with few hidden units, DANTE with many."""
    return Experiment("widths", "The width of the hidden layer", "2019 paper, figure 5", text, cases, picture="widths")


def _autoencoder(scale: Scale) -> Experiment:
    leaky = _autoencoder_case(scale, "leaky", FOUR, probe="pictures", title="leaky ReLU, 400 hidden, batch 400")
    sigmoid = replace(
        _autoencoder_case(scale, "sigmoid", FOUR[:2], epochs=scale.pick(5, 50), seeds=scale.seeds(3), shift=6),
        title="sigmoid, 400 hidden, batch 20", activation="sigmoid", batch=20,
    )  # fmt: skip
    earlier = replace(_autoencoder_case(scale, "2018", FOUR[:2], 600), title="leaky ReLU, 600 hidden, batch 500", batch=500)
    stacked = replace(
        _autoencoder_case(scale, "four layers", tuple(METHODS[n] for n in ("dante", "dante-stacked", "dante-tuned", "sgd"))),
        title="leaky ReLU, four layers, batch 500", widths=(1024, 500, 500, 500, 1024), batch=500,
    )  # fmt: skip
    text = f"""{PREPARED} The sigmoid net (2019, figure 2a) has mini-batches of 20. The net of four layers (2018, figure 6) is
trained round-robin, as two pairs of layers, each in the whole network with the others as they are, and so with 5 epochs of
end-to-end SGD at a rate of 3 afterwards; the paper gives neither widths, of which "500 → 500" is in its text, nor that rate,
which was not searched.
The picture shows the first test image of each digit, and what the first seed's nets make of it."""
    source = "2020 paper, figure 9; 2019 paper, figure 2; 2018 paper, figures 2, 3 and 6"
    return Experiment(
        "autoencoder",
        "Autoencoders and their reconstructions",
        source,
        text,
        (leaky, sigmoid, earlier, stacked),
        picture="reconstructions",
    )


EXPERIMENTS: dict[str, Callable[[Scale], Experiment]] = {
    "mlp": _mlp,
    "sigmoid": _sigmoid,
    "cross-entropy": _cross_entropy,
    "t-sweep": _t_sweep,
    "rivals": _rivals,
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "widths": _widths,
    "autoencoder": _autoencoder,
}


def only_full(name: str) -> list[str]:
    """What of an experiment a quick run leaves out: title and net of the cases that only the full one has."""
    if name not in EXPERIMENTS:  # one of a caller's own
        return []
    quick, full = ([f"{case.title} {case.net}" for case in EXPERIMENTS[name](Scale(f)).cases] for f in (False, True))
    return [each for each in full if each not in quick]
