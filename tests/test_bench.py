"""The benchmarks: what is wrong is reported and not timed, and both sides are timed alike."""

import gc
import importlib.util
import itertools
import shutil
import time
from dataclasses import replace

import pytest
import torch

from bench import limits, measure, quality, workloads
from bench.peers import Method, torch_autograd, torch_plain
from bench.workloads import OURS, Workload

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SMALL = Workload((12, 8, 4), batch=5, trained=2, rows=40)
KNOWN = limits.Limits(peak=1e11, bandwidth=1e10)


def rows_of(kind, names, workload=SMALL):
    return {row["method"]: row for row in measure.compare(kind, workload, CPU, names, 2, KNOWN)}


def know_truths(truths, family):
    """Before a mistake is made in what the truths come from too."""
    orders = [measure.Stretch(number) for number in range(measure.ORDERS)]
    for part in (*range(measure.TRIES), "most", *orders):
        truths.layers_after(family, part)
    for part in orders:
        truths.error_of_plain(family, part)


def forget_to_clear_gradients(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self: None)


def leave_out_the_last_batch(monkeypatch):
    real = torch_autograd.ForeachSgd.round
    monkeypatch.setattr(torch_autograd.ForeachSgd, "round", lambda self, order: real(self, order[:-5]))


def leave_the_weights_alone(monkeypatch):
    monkeypatch.setattr(torch_autograd.ForeachSgd, "round", lambda self, order: None)


def give_nan(monkeypatch):
    real = torch_autograd.ForeachSgd.layers
    monkeypatch.setattr(torch_autograd.ForeachSgd, "layers", lambda self: [(w * torch.nan, b) for w, b in real(self)])


MISTAKES = [forget_to_clear_gradients, leave_out_the_last_batch, leave_the_weights_alone, give_nan]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_peer_with_a_wrong_result_is_reported_and_not_timed(monkeypatch, mistake):
    truths = measure.Truths("pass", *workloads.random_problem(SMALL, CPU))
    assert measure.checked("torch_autograd:ForeachSgd", truths)[0]["status"] == "timed"  # the truth is kept for the second
    know_truths(truths, "sgd")
    mistake(monkeypatch)
    row, method = measure.checked("torch_autograd:ForeachSgd", truths)
    assert row["status"] == "wrong result"
    assert method is None
    assert "not timed" in row["note"]


@pytest.mark.parametrize("place", ["torch_autograd:ForeachSgd", "torch_autograd:Adam", "ours:Operators"])
def test_a_peer_that_leaves_out_the_last_rows_of_many_is_wrong(monkeypatch, place):
    problem, order = workloads.random_problem(SMALL._replace(rows=2000), CPU)
    truths = measure.Truths("pass", problem, order)
    assert measure.checked(place, truths)[0]["status"] == "timed"
    kind = workloads.method_class(place)
    know_truths(truths, kind.family)
    real = kind.round
    monkeypatch.setattr(kind, "round", lambda self, order: real(self, order[:1800] if len(order) > 1000 else order))
    row, method = measure.checked(place, truths)
    assert (row["status"], method) == ("wrong result", None)
    assert "without the last rows" in row["note"]


@pytest.mark.parametrize("place", ["torch_autograd:ForeachSgd", "torch_autograd:Adam", "torch_plain:PlainSngd"])
def test_a_peer_that_leaves_out_every_twentieth_mini_batch_is_wrong(monkeypatch, place):
    truths = measure.Truths("pass", *workloads.random_problem(Workload((64, 100, 10), 20, trained=2, rows=1600), CPU))
    assert measure.checked(place, truths)[0]["status"] == "timed"
    kind = workloads.method_class(place)
    know_truths(truths, kind.family)
    real = kind.round
    some = lambda order: torch.cat([rows for i, rows in enumerate(order.split(20)) if i % 20 != 19])  # noqa: E731
    monkeypatch.setattr(kind, "round", lambda self, order: real(self, some(order)))
    assert measure.checked(place, truths)[0]["status"] == "wrong result"


@pytest.mark.parametrize(
    ("method_flips", "plain_flips", "status"),
    [
        ({(0, 1.0)}, set(), "timed"),  # another order shows that the method is right
        ({(0, 1.0), (2, 1.0)}, {(1, 1.0)}, "timed"),
        ({(i, 1.0) for i in range(4)}, set(), "wrong result"),
        ({(i, 1.0) for i in range(1, 4)}, {(0, 1.0)}, "wrong result"),  # one flip of the plain one excuses nothing
        ({(i, 1.0) for i in range(4)}, {(0, 1.0), (1, 1.0)}, "timed"),  # flips are common: half of the work tells
        ({(i, f) for i in range(4) for f in (1.0, 0.5)}, {(0, 1.0), (1, 1.0)}, "wrong result"),
    ],
)
def test_a_flip_is_forgiven_where_it_is_seldom_or_strikes_the_plain_composition_too(
    monkeypatch, method_flips, plain_flips, status
):
    truths = measure.Truths("pass", *workloads.random_problem(SMALL, CPU))
    know_truths(truths, "sngd")
    real = truths.run

    def flipped(method, part):
        layers = real(method, part)
        return (
            [(w + 0.03 * (w - w0), b) for (w, b), (w0, _) in zip(layers, truths.problem.start, strict=True)]
            if part in method_flips
            else layers
        )

    plain = lambda family, part: 0.03 if part in plain_flips else 1e-6  # noqa: E731
    for number in range(measure.ORDERS):
        truths.layers_after("sngd", measure.Stretch(number, 0.5))
    monkeypatch.setattr(truths, "run", flipped)
    monkeypatch.setattr(truths, "error_of_plain", plain)
    assert measure.checked("torch_plain:PlainSngd", truths)[0]["status"] == status


@pytest.mark.parametrize("kind", ["step", "pass"])
def test_a_peer_that_stops_working_once_it_was_checked_is_wrong(monkeypatch, kind):
    real, calls = torch_autograd.ForeachSgd.update, []
    most = 4 * (len(range(0, 40, 5)) if kind == "pass" else measure.STEPS_IN_A_SAMPLE)
    monkeypatch.setattr(
        torch_autograd.ForeachSgd, "update", lambda *args: real(*args) if (calls.append(1), len(calls) <= most)[1] else None
    )
    row = rows_of(kind, ["torch SGD, foreach"])["torch SGD, foreach"]
    assert (row["status"], row["note"]) == ("wrong result", "right before it was timed, and not after; not timed")


def test_every_peer_says_how_to_wait_for_it():
    with pytest.raises(TypeError, match="wait"):
        type("NoWait", (Method,), {"reset": None, "round": None, "layers": None})(None)


@pytest.mark.parametrize("kind", ["pass", "quality"])
@pytest.mark.parametrize(("fraction", "status"), [(1.3, "timed"), (20.0, "wrong result")])
def test_a_time_below_the_machines_limit_is_marked_and_far_below_it_none(monkeypatch, kind, fraction, status):
    monkeypatch.setattr(limits, "fraction", lambda *_: fraction)
    if kind == "pass":
        (row,) = measure.compare(kind, SMALL, CPU, ["torch SNGD"], 2, KNOWN)
    else:
        ((row, _),) = next(quality.compare(*quality.load("digits", None, 100), CPU, ["torch SNGD"], 2, 1, 0.01, KNOWN))[:1]
    assert row["status"] == status
    assert ("median" in row) == (status == "timed")
    assert "of the machine's limit: work is put off" in row["note"]


def slow_to_read(monkeypatch, seconds=0.05):
    """Foreach SGD takes that long to give its weights."""
    real = torch_autograd.ForeachSgd.layers
    monkeypatch.setattr(torch_autograd.ForeachSgd, "layers", lambda self: (time.sleep(seconds), real(self))[1])


@pytest.mark.parametrize(("copy", "counted"), [(1e-3, True), (1.0, False)])
def test_work_that_is_put_off_until_the_weights_are_asked_for_is_timed(monkeypatch, copy, counted):
    slow_to_read(monkeypatch)
    monkeypatch.setattr(measure, "COPY_START", copy)
    problem, order = workloads.random_problem(SMALL, CPU)
    method = workloads.make("torch_autograd:ForeachSgd", problem)
    measure.one_sample("pass", method, order)  # the first is slow
    assert (measure.one_sample("pass", method, order) > 0.05) == counted
    assert (measure.one_sample("step", method, order, 2) > 0.025) == counted
    split, workload = quality.load("digits", None, 100)
    method.problem = quality.problem_of(split, workload, 0.1, 1, CPU)
    method = torch_autograd.ForeachSgd(method.problem)
    points = quality.curve(method, split, 2, 1)
    assert (points[-1]["seconds"] > 0.1) == counted


def test_a_copy_of_large_weights_is_not_timed(monkeypatch):
    slow_to_read(monkeypatch)
    monkeypatch.setattr(measure, "COPY_RATE", 1000)  # of 572 bytes
    assert measure.left_over(workloads.make("torch_autograd:ForeachSgd", workloads.random_problem(SMALL, CPU)[0])) == 0


def test_what_changes_an_arguments_form_has_no_data_to_gather_rows_from(monkeypatch):
    monkeypatch.setattr(torch_autograd.ForeachSgd, "convert", lambda self, order: self.problem.x[order])
    row = rows_of("pass", ["torch SGD, foreach"])["torch SGD, foreach"]
    assert (row["status"], row["note"].split(":")[0]) == ("failed", "TypeError")


@pytest.mark.parametrize(
    ("off", "reruns", "right"),
    [(0.0, 0.0, True), (0.05, 0.0, True), (0.05, 0.05, False), (0.5, 0.0, False)],  # a flip, not one, and no flip at all
)
def test_the_weights_after_the_last_sample_are_looked_at(monkeypatch, off, reruns, right):
    problem, order = workloads.random_problem(SMALL, CPU)
    truths = measure.Truths("pass", problem, order)
    _, method = measure.checked("torch_plain:PlainSngd", truths)
    real, moved = method.layers, [off]
    monkeypatch.setattr(
        method, "layers", lambda: [(w + moved[0] * (w - w0), b) for (w, b), (w0, _) in zip(real(), problem.start, strict=True)]
    )
    run = truths.run
    monkeypatch.setattr(truths, "run", lambda *args: (moved.__setitem__(0, reruns), run(*args))[1])
    assert truths.still_right(method) == right


def test_a_cold_sample_is_swept_last_and_conversions_are_not_timed():
    calls = []
    problem, order = workloads.random_problem(SMALL, CPU)

    class Told(torch_plain.PlainSngd):
        def __getattribute__(self, name):
            if name in ("reset", "round", "wait", "layers"):
                calls.append(name)
            return super().__getattribute__(name)

        @staticmethod
        def convert(tensor):
            calls.append("convert")
            return tensor

    measure.one_sample("pass", Told(replace(problem, rate=0.1)), order, before=lambda: calls.append("sweep"))
    assert [name for name in calls if name != "wait"] == ["convert", "reset", "sweep", "round", "layers"]
    assert calls[-6:] == ["wait", "sweep", "round", "wait", "layers", "wait"]


def test_torch_peers_gather_the_rows_once_a_round(monkeypatch):
    gathered = []
    real = torch.Tensor.__getitem__
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda self, key: (gathered.append(len(key)), real(self, key))[1])
    problem, order = workloads.random_problem(SMALL, CPU)
    for place in ("torch_plain:PlainSngd", "torch_autograd:ForeachSgd"):
        method = workloads.make(place, problem)
        method.reset()
        method.round(order)
        assert gathered == [40, 40], place
        gathered.clear()


def test_a_norm_without_the_bias_is_a_wrong_result(monkeypatch):
    def step(active, suffix, x, t, lr):
        before = active[1].clone()
        real(active, suffix, x, t, lr)
        moved = (active[1] - before).norm() / lr
        active[1].copy_(before + (active[1] - before) / (1 - moved**2).sqrt())

    real = torch_plain.sngd_step
    truths = measure.Truths("step", *workloads.random_problem(SMALL, CPU))
    know_truths(truths, "sngd")
    monkeypatch.setattr(torch_plain, "sngd_step", step)
    row, _ = measure.checked("torch_plain:PlainSngd", truths)
    assert row["status"] == "wrong result"


@pytest.mark.parametrize(("part", "status"), [(0, "timed"), (measure.WHOLE, "wrong result")])
def test_one_flip_at_the_kink_is_forgiven_and_another_loss_is_not(monkeypatch, part, status):
    truths = measure.Truths("pass", *workloads.random_problem(SMALL, CPU))
    know_truths(truths, "sngd")
    real = truths.run
    monkeypatch.setattr(truths, "run", lambda method, now: truths.problem.start if now == part else real(method, now))
    assert measure.checked("torch_plain:PlainSngd", truths)[0]["status"] == status


@pytest.mark.parametrize(("plain_error", "status"), [(0.2, "timed"), (0.1, "wrong result")])
def test_no_method_is_held_to_more_than_the_plain_composition(monkeypatch, plain_error, status):
    truths = measure.Truths("pass", *workloads.random_problem(SMALL, CPU))
    monkeypatch.setattr(truths, "at_the_end", lambda method: (0.3, 0.0, True))
    assert truths.error_of_plain("sngd", measure.WHOLE) < 1e-5
    monkeypatch.setattr(truths, "error_of_plain", lambda family, part: plain_error)
    assert measure.checked("ours:Operators", truths)[0]["status"] == status


def test_only_what_is_right_gets_a_time_in_the_table(monkeypatch):
    leave_the_weights_alone(monkeypatch)
    rows = rows_of("pass", ["torch SNGD", "torch SGD, foreach", "torch SGD", "CUDA graph SGD"])
    assert {name: row["status"] for name, row in rows.items()} == {
        "torch SNGD": "timed", "torch SGD, foreach": "wrong result", "torch SGD": "timed", "CUDA graph SGD": "not here",
    }  # fmt: skip
    assert all(("median" in row) == (row["status"] == "timed") for row in rows.values())


def test_a_peer_that_is_not_installed_or_breaks_is_a_row_that_says_so(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else real(name))
    monkeypatch.setattr(torch_autograd.FusedSgd, "update", lambda *_: 1 / 0)
    rows = rows_of("pass", ["JAX scan SGD", "torch SGD, fused", "torch SGD"])
    assert (rows["JAX scan SGD"]["status"], rows["JAX scan SGD"]["note"]) == ("not here", "jax is not installed")
    assert rows["torch SGD, fused"]["status"] == "failed"
    assert "ZeroDivisionError" in rows["torch SGD, fused"]["note"]
    assert rows["torch SGD"]["status"] == "timed"


def test_every_method_here_gives_its_familys_result():
    names = [name for name in SMALL.methods("pass") if "compile" not in name]
    statuses = {name: row["status"] for name, row in rows_of("pass", names, SMALL._replace(epochs=2)).items()}
    assert set(statuses.values()) <= {"timed", "not here"}, statuses
    assert {statuses[name] for name in ("torch SNGD", "torch SGD", "torch Adam, fused", "scikit-learn MLP")} == {"timed"}


def test_a_peer_that_breaks_while_it_is_timed_loses_only_its_own_row(monkeypatch):
    left = [8]
    real = torch_autograd.FusedSgd.reset

    def reset(self):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")
        real(self)

    monkeypatch.setattr(torch_autograd.FusedSgd, "reset", reset)
    rows = list(measure.compare("pass", SMALL, CPU, [OURS, "torch SGD, fused", "torch SGD"], 20, KNOWN))
    assert [row["status"] for row in rows] == ["timed", "failed", "timed"]
    assert "out of memory" in rows[1]["note"]


def test_a_method_that_killed_an_earlier_process_is_not_run_and_each_is_named_before_it_is(monkeypatch):
    named = []
    watch = measure.Watch({OURS: "killed it", "torch SGD": "killed it"}, named.append)
    made, real = [], workloads.make
    monkeypatch.setattr(workloads, "make", lambda place, problem: (made.append((place, named[-1])), real(place, problem))[1])
    rows = list(measure.compare("pass", SMALL, CPU, [OURS, "torch SGD", "torch SNGD"], 2, KNOWN, watch=watch))
    assert [(row["status"], row.get("note")) for row in rows] == [("failed", "killed it")] * 2 + [("timed", None)]
    split, workload = quality.load("digits", None, 100)
    (pairs,) = quality.compare(split, workload, CPU, ["torch SNGD", "torch SGD"], 2, 1, 0.01, KNOWN, watch)
    assert [row["status"] for row, _ in pairs] == ["timed", "failed"]
    assert made == [("torch_plain:PlainSngd", "torch SNGD")] * 2


def test_who_is_at_work_is_told_before_each_sample(monkeypatch):
    named, at_work, real = [], [], torch_autograd.ForeachSgd.round
    told = lambda self, order: (at_work.append(named[-1]), real(self, order))[1]  # noqa: E731
    monkeypatch.setattr(torch_autograd.ForeachSgd, "round", told)
    names, watch = ["torch SGD, foreach", "torch SNGD"], measure.Watch(at=named.append)
    list(measure.compare("pass", SMALL, CPU, names, 2, KNOWN, watch=watch))
    list(quality.compare(*quality.load("digits", None, 100), CPU, names, 2, 1, 0.01, KNOWN, watch))
    assert set(at_work) == {"torch SGD, foreach"}


def test_a_time_to_quality_survives_a_peer_that_breaks_in_a_timed_seed(monkeypatch):
    split, workload = quality.load("digits", None, 100)
    real = quality.curve

    def curve(method, split, rounds, seed, target=None):
        if seed == 2 and isinstance(method, torch_autograd.ForeachSgd):
            raise RuntimeError("out of memory")
        return real(method, split, rounds, seed, target)

    monkeypatch.setattr(quality, "curve", curve)
    (pairs,) = quality.compare(split, workload, CPU, ["torch SGD", "torch SGD, foreach"], 2, 1, 0.01, KNOWN)
    assert [(row["status"], drawn is not None) for row, drawn in pairs] == [("timed", True), ("failed", False)]


def test_a_time_to_quality_is_of_checked_methods_only(monkeypatch):
    split, workload = quality.load("digits", None, 100)
    real = torch_autograd.ForeachSgd.round
    monkeypatch.setattr(torch_autograd.ForeachSgd, "round", lambda self, order: real(self, torch.cat([order, order])))
    (pairs,) = quality.compare(split, workload, CPU, ["torch SGD", "torch SGD, foreach", "torch SNGD"], 2, 1, 0.01, KNOWN)
    assert [row["status"] for row, _ in pairs] == ["timed", "wrong result", "timed"]


def test_a_time_to_quality_takes_turns_in_drawn_orders_and_is_given_after_each_seed(monkeypatch):
    split, workload = quality.load("digits", None, 100)
    names = ["torch SGD", "torch momentum, fused", "torch SNGD"]
    calls = []

    def curve(method, split, rounds, seed, target=None):
        if seed:
            calls.append((seed, method.family, gc.isenabled()))
        return [{"weights_updated": 1, "seconds": 1.0, "loss": 0.1, "accuracy": 1.0}]

    monkeypatch.setattr(quality, "curve", curve)
    given = list(quality.compare(split, workload, CPU, names, 9, 1, 0.5, KNOWN))
    assert [[row["repeats"] for row, _ in pairs] for pairs in given] == [[seed] * 3 for seed in range(2, 10)]
    turns = [[family for of, family, _ in calls if of == seed] for seed in range(1, 10)]
    assert all(sorted(turn) == ["momentum", "sgd", "sngd"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 3
    assert not any(enabled for *_, enabled in calls)
    assert gc.isenabled()


def test_samples_are_taken_in_turn_and_the_first_does_not_count():
    calls = []
    samples = {name: lambda name=name: (calls.append(name), float(len(calls)))[1] for name in "abc"}
    seconds = measure.interleave(samples, repeats=8)
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(turns) == 9
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 3  # more orders than the three rotations
    assert seconds == {name: [i + 1.0 for i, called in enumerate(calls) if called == name][1:] for name in "abc"}


def test_a_spread_over_15_percent_is_marked():
    assert not measure.summary([1.0, 1.01, 1.02, 1.03, 1.04])["noisy"]
    found = measure.summary([1.0, 1.0, 1.1, 1.3, 1.4])
    assert found["noisy"]
    assert found["p20"] < found["median"] < found["p80"]
    few = measure.summary([1.0, 4.0])
    assert 1 <= few["p20"] <= few["p80"] <= 4


def test_samples_are_taken_without_the_garbage_collector():
    seen = []
    measure.interleave({"a": lambda: float(not seen.append(gc.isenabled()))}, repeats=2)
    assert seen == [False] * 3
    assert gc.isenabled()


@pytest.mark.parametrize(("apart", "noisy"), [(0.149, False), (0.151, True)])
def test_ratios_rates_and_the_noisy_mark_are_those_of_the_samples(monkeypatch, apart, noisy):
    """Ours takes 2 s and the other 3 s, of 40 rows, or of 5 in a step."""
    ours = [2.0 * (1 + apart * part) for part in (-0.6, -0.5, 0, 0, 0.5, 0.6)]  # p20 and p80 are the second and the fifth
    monkeypatch.setattr(measure, "interleave", lambda samples, repeats: {OURS: ours, "torch SGD": [1.5 * s for s in ours]})
    for kind, rows in (("pass", 40), ("step", 5)):
        first, second = measure.compare(kind, SMALL, CPU, [OURS, "torch SGD"], 6, KNOWN)
        assert (first["ratio"], second["ratio"]) == pytest.approx((1, 1.5))
        assert (first["samples_per_second"], second["samples_per_second"]) == pytest.approx((rows / 2, rows / 3))
        assert [(row["noisy"], row["spread"]) for row in (first, second)] == [(noisy, pytest.approx(apart))] * 2


def test_the_peer_in_jax_waits_for_its_last_weights(monkeypatch):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    problem, order = workloads.random_problem(SMALL, CPU)
    waited, real = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda arrays: (waited.append(jax.tree.leaves(arrays)), real(arrays))[1])
    for name in ("JAX scan SGD", "JAX scan SNGD"):
        method = workloads.make(workloads.METHODS[name], problem)
        measure.one_sample("pass", method, order)
        assert {id(array) for array in jax.tree.leaves(method.weights)} == {id(array) for array in waited[-1]}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_peers_give_their_familys_result():
    rows = rows_of("step", ["torch.compile SGD", "torch.compile SNGD"])
    assert {name: (row["status"], row.get("note")) for name, row in rows.items()} == dict.fromkeys(rows, ("timed", None))


def test_a_sample_starts_from_the_same_weights():
    problem, order = workloads.random_problem(SMALL, CPU)
    for place in ("torch_plain:PlainSngd", "torch_autograd:Adam", "ours:Fit"):
        method = workloads.make(place, problem)
        measure.one_sample("pass", method, order)
        first = [t.clone() for layer in method.layers() for t in layer]
        measure.one_sample("pass", method, order)
        assert all(torch.equal(a, b) for a, b in zip(first, itertools.chain(*method.layers()), strict=True)), place
