"""Steps and passes: every method is checked against its float64 truth, and only what is right is timed, in turn."""

from __future__ import annotations

import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import limits, workloads
from .peers import Layers, Method, NotHere, Problem, loss_and_hits
from .workloads import OURS, Workload

Row = dict[str, Any]
STEPS_IN_A_SAMPLE = 50
STEP = "one step (SNGD: first layer, others: all)"
COPY_START, COPY_RATE = 1e-3, 3e8  # seconds and bytes/s: no copy of weights was seen to take more than a third of this
NOISY = 0.15  # (p80 - p20) / median beyond which a row is marked
# A method is right if, after a few mini-batches, it is this near to the float64 result, in parts of the way from the start,
# by torch's float32_matmul_precision. What was seen in "highest" is below 1e-4, unless a pre-activation lies so near to the
# kink of leaky ReLU that rounding decides on which side: one such flip was seen to move a result by 4e-2. They are rare in
# a few mini-batches, so other mini-batches are tried before the method is called wrong.
TOLERANCE = {"highest": 1e-3, "high": 0.05, "medium": 0.3}
TRIES = 3
# All that is timed is held to the same tolerance, in one of some orders of the rows: right results were off by 1e-6 to 1e-4
# there, or after a flip by up to 30 %, which leaving out every twentieth mini-batch is too. Flips strike one order and one
# method at random, so an order judges only where the family's plain composition in float32 meets none, and one order is
# enough; where it meets one in more than one of the orders, half of the work is looked at, and so on.
ORDERS = 4
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
# After all that is timed, in the order that is timed and whatever flips: the weights must be this near, the loss must have
# gone as far as that of float64, to this part, and a pass must be nearer to the float64 result than to that without the last
# tenth of the rows. A flip that grows from step to step (batches of 1, RMSProp) moves right weights by more than a third, so
# no method is held to more than twice the error of the family's plain composition in float32 here.
END_TOLERANCE = 0.2


@dataclass
class Watch:
    """`at` is told which method is at work now; `dead` has those that ended an earlier process, and how: they are not run."""

    dead: dict[str, str] = field(default_factory=dict)
    at: Callable[[str], object] = lambda name: None


class Stretch(NamedTuple):
    """A part of what is timed: the rows in the order of that number, and how much of the work."""

    order: int = 0
    fraction: float = 1.0


WHOLE = Stretch()


def distance(one: Layers, other: Layers) -> float:
    """Between two results, in float64."""
    pairs = [(a.cpu().double(), b.cpu().double()) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)]
    return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5


def error_of(got: Layers, exact: Layers, start: Layers) -> float:
    """Distance between two results, in parts of the way from the start to the second."""
    return distance(got, exact) / distance(exact, start)


def one_sample(
    kind: str, method: Method, order: Tensor, steps: int = STEPS_IN_A_SAMPLE, before: Callable[[], object] | None = None
) -> float:
    """Seconds of one round, or of one step (the mean of many on the first mini-batch), from the start's weights.

    The time has all that is not a change of the arguments' form. `before` is called last before the time begins.
    """
    p = method.problem
    rows = order[: p.batch]
    arguments = [order] if kind == "pass" else [p.x[rows], p.y[rows], p.one_hot[rows]]
    inputs = [type(method).convert(tensor) for tensor in arguments]
    times = 1 if kind == "pass" else steps
    method.reset()
    method.wait()
    if before is not None:
        before()
    begin = time.perf_counter()
    for _ in range(times):
        (method.round if kind == "pass" else method.step)(*inputs)
    method.wait()
    return (time.perf_counter() - begin + left_over(method)) / times


def left_over(method: Method) -> float:
    """Seconds that it takes to read the weights of a method that was waited for, if no copy takes so long: it has put off
    work until then. Else nothing."""
    begin = time.perf_counter()
    layers = method.layers()
    method.wait()
    seconds = time.perf_counter() - begin
    return seconds if seconds > COPY_START + sum(t.nbytes for layer in layers for t in layer) / COPY_RATE else 0.0


@contextmanager
def still() -> Iterator[None]:
    """Without Python's garbage collector, which would stop one method for what another has left."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(samples: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """`repeats` samples of each after one that does not count, in turn, in every turn in another order, drawn from a seed."""
    names = list(samples)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    draw = random.Random(0)
    with still():
        for turn in range(repeats + 1):
            for name in draw.sample(names, len(names)):
                value = samples[name]()
                if turn:
                    seconds[name].append(value)
    return seconds


def summary(seconds: list[float]) -> Row:
    """Median, p20, p80 and whether they are too far apart to be believed."""
    p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    median = statistics.median(seconds)
    spread = (p80 - p20) / median
    return {"median": median, "p20": p20, "p80": p80, "spread": spread, "noisy": spread > NOISY, "repeats": len(seconds)}


class Truths:
    """What the families' float64 runs come to, each run once: after a few mini-batches, and after all of a sample's work.

    A sample of steps has `steps` of them. `ends` has each checked method's own weights after everything.
    """

    def __init__(self, kind: str, problem: Problem, order: Tensor, steps: int = STEPS_IN_A_SAMPLE) -> None:
        self.kind, self.problem, self.order, self.steps = kind, problem, order, steps
        self.ends: dict[Method, Layers] = {}
        self.layers_after = functools.cache(self._layers_after)
        self.losses = functools.cache(self._losses)
        self.error_of_plain = functools.cache(self._error_of_plain)

    def run(self, method: Method, part: int | str | Stretch) -> Layers:
        """The method's weights after a stretch, after all but the last tenth ("most"), or the few mini-batches of a number."""
        batch, rows = self.problem.batch, len(self.order)
        if isinstance(part, Stretch):
            some = max(1, round(part.fraction * (rows // batch))) * batch
            order = self.order.roll(-part.order * rows // ORDERS)[:some]
            one_sample(self.kind, method, order, max(1, round(part.fraction * self.steps)))
        elif isinstance(part, str):
            one_sample(self.kind, method, self.order[: -max(1, rows // batch // 10) * batch])
        else:
            some = max(3, -(-200 // batch)) * batch  # 200, so that each class is among them
            one_sample(self.kind, method, self.order.roll(-part * some)[:some], steps=3)
        return method.layers()

    def _layers_after(self, family: str, part: int | str | Stretch) -> Layers:
        return self.run(self._plain(family, self.problem.double()), part)

    def _plain(self, family: str, problem: Problem) -> Method:
        return workloads.plain(family, replace(problem, rate=workloads.timing_rate(family)))

    def _error_of_plain(self, family: str, part: Stretch) -> float:
        """How far the family's plain composition is from the truth, in the precision that is timed."""
        return self.error_after(self._plain(family, self.problem), part)

    def error_after(self, method: Method, part: int | Stretch) -> float:
        """How far the method is from the truth there."""
        return error_of(self.run(method, part), self.layers_after(method.family, part), self.problem.start)

    def _losses(self, family: str) -> tuple[float, float]:
        """(at the start, after everything)."""
        return self.loss(family, self.problem.start), self.loss(family, self.layers_after(family, WHOLE))

    def loss(self, family: str, layers: Layers) -> float:
        """On what was trained on."""
        rows = self.order[: self.problem.batch if self.kind == "step" else None]
        return loss_and_hits(family, layers, self.problem.x[rows], self.problem.y[rows])[0]

    def error(self, method: Method) -> float:
        """How far the method is from the truth after a few mini-batches, at the best of some tries."""
        best = math.inf
        for part in range(TRIES):
            best = min(best, self.error_after(method, part))
            if best <= tolerance():
                break
        return best

    def error_where_steady(self, method: Method) -> float | None:
        """How far the method is from the truth after the longest stretch in which the plain composition meets no flip, at
        the best of some orders; None where flips are everywhere."""
        for fraction in FRACTIONS:
            best, judges = math.inf, 0
            for part in (Stretch(number, fraction) for number in range(ORDERS)):
                if not self.error_of_plain(method.family, part) <= tolerance():
                    continue
                judges += 1
                best = min(best, self.error_after(method, part))
                if best <= tolerance():
                    return best
            if judges >= ORDERS - 1:
                return best
        return None

    def at_the_end(self, method: Method) -> tuple[float, float, bool]:
        """Run everything: `from_the_end` of the weights, which are kept in `ends`."""
        got = self.run(method, WHOLE)
        self.ends[method] = [(w.clone(), b.clone()) for w, b in got]
        return self.from_the_end(method.family, got)

    def from_the_end(self, family: str, got: Layers) -> tuple[float, float, bool]:
        """How far these weights are from the truth after everything, how far the loss, in parts of the truth's way or of a
        tenth of it, and whether the last rows were trained on."""
        start, end = self.losses(family)
        exact = self.layers_after(family, WHOLE)
        loss_error = abs(self.loss(family, got) - end) / max(abs(start - end), 0.1 * abs(end))
        several = self.kind == "pass" and len(self.order) > self.problem.batch
        whole = not several or distance(got, exact) < distance(got, self.layers_after(family, "most"))
        return error_of(got, exact, self.problem.start), loss_error, whole

    def right_at_the_end(self, family: str, end_error: float, loss_error: float, whole: bool) -> bool:
        """Whether what `from_the_end` gave will do."""
        most = max(END_TOLERANCE, tolerance())
        if end_error > most:
            most = max(most, 2 * self.error_of_plain(family, WHOLE))
        return end_error <= most and loss_error <= END_TOLERANCE and whole

    def still_right(self, method: Method) -> bool:
        """Whether the weights after its last sample are those that were checked.

        A kernel that does not add in a fixed order may flip in any run. So other weights will do if they are right at the
        end too, and the method comes to the checked ones when it is run again.
        """

        def same(layers: Layers) -> bool:
            return error_of(layers, self.ends[method], self.problem.start) <= tolerance()

        last = [(w.clone(), b.clone()) for w, b in method.layers()]
        if same(last):
            return True
        right = self.right_at_the_end(method.family, *self.from_the_end(method.family, last))
        return right and any(same(self.run(method, WHOLE)) for _ in range(TRIES))


def tolerance() -> float:
    """For the precision that is set."""
    return TOLERANCE[torch.get_float32_matmul_precision()]


def watched(name: str, truths: Truths, watch: Watch) -> tuple[Row, Method | None]:
    """`checked`, for a method by its name; one that is dead has failed."""
    if name in watch.dead:
        return {"status": "failed", "note": watch.dead[name]}, None
    watch.at(name)
    return checked(workloads.METHODS[name], truths)


def failed(failure: Exception) -> Row:
    """The fields that say so."""
    return {"status": "failed", "note": " ".join(f"{type(failure).__name__}: {failure}".split())[:200]}


def checked(place: str, truths: Truths) -> tuple[Row, Method | None]:
    """(status, note and error of a method, the method where it may be timed); it is warm then."""
    try:
        method = workloads.make(place, truths.problem)
        error, (end_error, loss_error, whole) = truths.error(method), truths.at_the_end(method)
        steady = truths.error_where_steady(method)
    except NotHere as reason:
        return {"status": "not here", "note": str(reason)}, None
    except Exception as failure:  # a peer that breaks is a row of the table, and no reason to lose the others
        return failed(failure), None
    row: Row = {"status": "timed", "error": error, "rate": method.problem.rate}
    right = error <= tolerance() and (steady is None or steady <= tolerance())
    if not (right and truths.right_at_the_end(method.family, end_error, loss_error, whole)):
        tail = "" if steady is None else f", by {steady:.2g} where float32 is steady"
        tail += "" if whole else ", and more like a run without the last rows"
        note = (
            f"off float64 by {error:.2g} after a few mini-batches, by {end_error:.2g} at the end, its loss by {loss_error:.2g}"
        )
        return row | {"status": "wrong result", "note": f"{note}{tail}; not timed"}, None
    return row, method


@functools.cache
def latency_of_a_step(kind: str, layers: int, device: torch.device) -> float | None:
    """Seconds of our kernels' step where there is next to nothing to compute; None where they cannot run."""
    tiny = Workload((2,) * (layers + 1), batch=1, rows=500)
    problem, order = workloads.random_problem(tiny, device)
    try:
        method = workloads.make(workloads.METHODS[OURS], problem)
    except NotHere:
        return None
    samples = [one_sample(kind, method, order) for _ in range(5)]
    return statistics.median(samples) / limits.steps(kind, tiny, "sngd")


def compare(
    kind: str,
    workload: Workload,
    device: torch.device,
    names: list[str],
    repeats: int,
    known: limits.Limits,
    cold: bool = False,
    watch: Watch | None = None,
) -> Iterator[Row]:
    """One row for each method. With `cold`, the GPU's L2 cache is swept before every sample, which is one step then."""
    watch = watch or Watch()
    problem, order = workloads.random_problem(workload, device)
    truths = Truths(kind, problem, order, 1 if cold else STEPS_IN_A_SAMPLE)
    rows: dict[str, Row] = {}
    methods: dict[str, Method] = {}
    for name in names:
        rows[name], method = watched(name, truths, watch)
        if method is not None:
            methods[name] = method
    sweep = torch.empty(2 * limits.cache_bytes(device) // 4, device=device) if cold else None

    def sample(name: str) -> float:
        if rows[name]["status"] == "failed":
            return math.nan
        watch.at(name)
        try:
            return one_sample(kind, methods[name], order, truths.steps, None if sweep is None else swept)
        except Exception as failure:  # as in checked
            rows[name] = failed(failure)
            return math.nan

    def swept() -> None:
        assert sweep is not None
        sweep.zero_()
        torch.cuda.synchronize()

    seconds = interleave({name: functools.partial(sample, name) for name in methods}, repeats)
    for name, method in methods.items():
        if rows[name]["status"] != "timed":
            continue
        fraction = limits.fraction(kind, workload, method.family, device, known, statistics.median(seconds[name]))
        rows[name] |= {"limit_fraction": fraction} | limits.too_fast(fraction)
        watch.at(name)
        try:
            if not truths.still_right(method):
                rows[name] |= {"status": "wrong result", "note": "right before it was timed, and not after; not timed"}
        except Exception as failure:  # as in checked
            rows[name] = failed(failure)
    watch.at(OURS)
    latency = None if OURS in watch.dead else latency_of_a_step(kind, workload.layers, device)
    regime = limits.regime(kind, workload, device, known, latency)
    for name, row in rows.items():
        head = {
            "kind": kind, "net": workload.net, "batch": workload.batch, "rows": workload.rows, "method": name,
            "work": workload.what if kind == "pass" else STEP, "cache": "cold" if cold else "warm", "regime": regime,
        }  # fmt: skip
        if row["status"] == "timed":
            row |= summary(seconds[name])
            row["samples_per_second"] = limits.samples(kind, workload) / row["median"]
            if rows.get(OURS, row)["status"] == "timed" and OURS in methods:
                row["ratio"] = statistics.median(a / b for a, b in zip(seconds[name], seconds[OURS], strict=True))
        yield head | row
