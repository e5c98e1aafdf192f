"""Recorded passes, with a stand-in for CUDA graphs: it notes the launches and makes them again, interpreted.

As a real graph it bakes in the tensors and numbers of each launch, runs nothing while it records, and takes no notice of
what the caller passes later.
"""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from support import Problem, make_problem

from dante_kernels import kernels, losses
from dante_kernels.kernels import fused, graphs, launcher
from dante_kernels.ops.layer import flatten

ROWS, BATCH = 23, 9


class Recorder:
    """In place of `graphs.CudaRecorder`: notes what is launched instead of launching it, and launches it on replay."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.stream, self.recorded, self.replayed, self.keeps_launches = monkeypatch, 1, 0, 0, True

    def place(self, tensor):
        return self.stream

    def record(self, run):
        self.recorded += 1
        noted = []
        with self.monkeypatch.context() as patch:
            patch.setattr(launcher, "launch", lambda *args, **options: noted.append((args, options)))
            results = run()
        if not self.keeps_launches:
            noted.clear()

        def replay():
            self.replayed += 1
            for args, options in noted:
                launcher.launch(*args, **options)

        return graphs.Recording(replay, results, 1000)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(graphs, "_shared", graphs.Graphs(recorder))
    return recorder


def problem(seed=0, **rest) -> Problem:
    return make_problem(seed=seed, **{"rows": ROWS, "n_in": 11, "widths": (8, 3), "class_indices": True} | rest)


def velocity_of(p: Problem):
    return torch.zeros_like(p.weight), torch.zeros_like(p.bias)


def epoch(p: Problem, order, lr, rule=()):
    arguments = (p.weight, p.bias, p.x, p.target, order, BATCH, *flatten(p.suffix, p.activation), losses.code(p.loss))
    return kernels.sngd_epoch_(*arguments, torch.tensor(lr), *rule)


def eager(*arguments):
    """The same pass launch by launch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANTE_CUDA_GRAPHS", "0")
        return epoch(*arguments)


def shuffled(seed: int) -> torch.Tensor:
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))


def same(p: Problem, q: Problem, ours, theirs) -> None:
    for a, b in zip((p.weight, p.bias, *ours), (q.weight, q.bias, *theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["fused", "streamed"])
def test_replays_give_the_eager_bits_for_new_orders_rates_and_weights(recorder, name, monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", name)
    p = problem()
    q = p.clone()
    rules = [(*velocity_of(r), 0.9, True) for r in (p, q)]
    kept = []
    for call, lr in enumerate((0.3, 0.2, 0.1, 0.05)):
        order = shuffled(call)
        theirs = eager(q, order, lr, rules[1])
        ours = epoch(p, order, lr, rules[0])
        same(p, q, ours, theirs)
        kept.append((ours, [t.clone() for t in theirs]))
        for r in (p, q):  # another step of training in between
            r.weight += 0.1 * (call + 1)
            r.x.neg_()
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    for ours, theirs in kept:  # a later replay leaves earlier results alone
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_pass_without_an_order_and_a_last_layer_are_replayed_too(recorder):
    for rest in ({}, {"widths": (4,), "bias": False, "loss": "cross_entropy"}):
        p = problem(**rest)
        q = p.clone()
        for lr in (0.3, 0.2, 0.1):
            ours, theirs = epoch(p, None, lr), eager(q, None, lr)
            assert torch.equal(p.weight, q.weight)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (recorder.recorded, recorder.replayed) == (2, 4)


def test_two_models_take_turns(recorder):
    pairs = [(p, p.clone()) for p in (problem(0), problem(2))]
    for call in range(3):
        for p, q in pairs:
            order = shuffled(call)
            same(p, q, epoch(p, order, 0.2), eager(q, order, 0.2))
    assert (recorder.recorded, recorder.replayed) == (2, 4)


def moved(t):
    return t.clone()


# What must not be served by the recording of another pass.
CHANGES = {
    "weight": lambda p: setattr(p, "weight", moved(p.weight)),
    "bias": lambda p: setattr(p, "bias", moved(p.bias)),
    "x": lambda p: setattr(p, "x", moved(p.x)),
    "target": lambda p: setattr(p, "target", p.target.flip(0)),
    "strides of x": lambda p: setattr(p, "x", p.x.as_strided(p.x.shape, (0, 1))),
    "a suffix weight": lambda p: p.suffix.__setitem__(0, p.suffix[0]._replace(weight=2 * p.suffix[0].weight)),
    "a suffix without bias": lambda p: p.suffix.__setitem__(0, p.suffix[0]._replace(bias=None)),
    "the activation": lambda p: setattr(p, "activation", type(p.activation)("tanh")),
    "the loss": lambda p: setattr(p, "loss", "binary_cross_entropy"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_graph_bakes_in_is_its_key(recorder, what):
    p = problem()
    q = p.clone()
    for call in range(5):
        if call == 2:
            CHANGES[what](p)
            CHANGES[what](q)
        same(p, q, epoch(p, shuffled(call), 0.2), eager(q, shuffled(call), 0.2))
    assert (recorder.recorded, recorder.replayed) == (2, 3)


def test_numbers_precision_and_stream_are_part_of_the_key(recorder):
    p = problem()
    q = p.clone()
    rules = [velocity_of(r) for r in (p, q)]
    before = torch.get_float32_matmul_precision()
    try:
        for call, (momentum, nesterov, precision, stream) in enumerate(
            [(0.9, False, "highest", 1), (0.5, False, "highest", 1), (0.5, True, "highest", 1), (0.5, True, "medium", 1),
             (0.5, True, "medium", 2)]
        ):  # fmt: skip
            torch.set_float32_matmul_precision(precision)
            recorder.stream = stream
            for _ in range(2):
                order, how = shuffled(call), (momentum, nesterov)
                same(p, q, epoch(p, order, 0.2, (*rules[0], *how)), eager(q, order, 0.2, (*rules[1], *how)))
            assert (recorder.recorded, recorder.replayed) == (call + 1, call + 1)
        shorter = order[:7]
        same(p, q, epoch(p, shorter, 0.2, (*rules[0], *how)), eager(q, shorter, 0.2, (*rules[1], *how)))
        assert recorder.replayed == 5
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_graph_keeps_nothing_of_the_caller_s(recorder):
    recorder.keeps_launches = False
    p = problem()
    for call in range(3):
        epoch(p, shuffled(call), 0.2)
    alive = [weakref.ref(t) for t in (p.x, p.weight, p.bias, p.target)]
    assert recorder.replayed == 2
    del p
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_the_least_recently_used_graphs_go_first(recorder, monkeypatch):
    def recorded_for(p):
        before = recorder.recorded
        for _ in range(2):
            epoch(p, None, 0.2)
        return recorder.recorded > before

    problems = [problem(seed) for seed in range(0, 8, 2)]
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    monkeypatch.setattr(graphs, "NODE_BYTES", 0)
    assert [recorded_for(p) for p in problems[:3]] == [True] * 3
    assert not recorded_for(problems[0])
    assert recorded_for(problems[3])  # in the place of the second
    assert not recorded_for(problems[0])
    assert recorded_for(problems[1])
    monkeypatch.setattr(graphs, "MOST_BYTES", 2500)  # two of 1000 bytes and what they copy
    assert recorded_for(problems[2])
    assert len(graphs._shared.entries) == 2
    monkeypatch.setattr(graphs, "NODE_BYTES", 1000)  # of a launch, of which there are several
    assert recorded_for(problems[3])
    assert len(graphs._shared.entries) == 1
    monkeypatch.setattr(graphs, "MOST_BYTES", 10)
    assert recorded_for(problems[0])  # too large alone, but it is the one in use
    assert len(graphs._shared.entries) == 1


@pytest.mark.parametrize("doubt", ["switched off", "nothing to record on", "many launches", "another thread"])
def test_any_doubt_means_launch_by_launch(recorder, monkeypatch, doubt):
    if doubt == "switched off":
        monkeypatch.setenv("DANTE_CUDA_GRAPHS", "0")
    elif doubt == "nothing to record on":
        recorder.stream = None
    elif doubt == "many launches":
        monkeypatch.setattr(graphs, "MOST_LAUNCHES", 14)  # three steps of five
    else:
        graphs._shared._lock.acquire()
    p = problem()
    q = p.clone()
    for call in range(3):
        same(p, q, epoch(p, shuffled(call), 0.2), eager(q, shuffled(call), 0.2))
    assert recorder.recorded == 0
    assert not graphs._shared.entries


def test_an_unknown_switch_is_refused(recorder, monkeypatch):
    monkeypatch.setenv("DANTE_CUDA_GRAPHS", "yes")
    with pytest.raises(ValueError, match="DANTE_CUDA_GRAPHS: expected 0 or 1, got 'yes'"):
        epoch(problem(), None, 0.2)


def test_a_recording_that_fails_ends_recording_and_the_pass_is_made(recorder, monkeypatch, caplog):
    def fail(run):
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(recorder, "record", fail)
    p = problem()
    q = p.clone()
    with caplog.at_level(logging.WARNING, "dante_kernels"):
        for call in range(4):
            same(p, q, epoch(p, shuffled(call), 0.2), eager(q, shuffled(call), 0.2))
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graphs from now on, since recording one failed: not while capturing"
    ]


def test_a_call_that_fails_is_not_a_first_call(recorder):
    """It has not compiled what would be recorded."""
    p = problem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused.Pass, "run", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            epoch(p, None, 0.2)
    epoch(p, None, 0.2)
    assert recorder.recorded == 0
    assert not graphs._shared._lock.locked()


def test_inference_mode_and_none_share_a_graph(recorder):
    p = problem()
    with torch.inference_mode():
        epoch(p, shuffled(0), 0.2)
    epoch(p, shuffled(1), 0.2)
    with torch.inference_mode():
        epoch(p, shuffled(2), 0.2)
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_a_cpu_tensor_is_never_recorded():
    assert graphs.CudaRecorder().place(torch.zeros(())) is None
