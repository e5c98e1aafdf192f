"""Short blocks of a deeper net: recorded once and replayed, with the bits of block after block."""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dante_kernels as dk
from dante_kernels import kernels
from dante_kernels.kernels import cost, graphs, launcher
from dante_kernels.ops.blocks import Block, Launcher, Round, Span, Velocity, _apart, launches_of_step, norms_or_one
from dante_kernels.training import trainer
from dante_kernels.training.trainer import Trainer

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(23, 6, generator=GENERATOR)
Y = torch.randint(0, 3, (23,), generator=GENERATOR)


class Recorder(TorchDispatchMode):
    """In place of `graphs.CudaRecorder`: notes torch's operations and the launches of kernels, and makes them again.

    As in a CUDA graph, what a run makes lies where the recording has put it, and nothing that was there before is changed by
    recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Any] = []
        self.recorded = self.replayed = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aliases = [argument.alias_info for argument in op._schema.arguments if argument.alias_info is not None]
        if any(alias.is_write for alias in aliases):
            self.noted.append(lambda: op(*args, **kwargs))
            return args[0] if op._schema.returns else None
        made = op(*args, **kwargs)
        if not aliases:  # a view shows what lies there anyway
            results = [made] if isinstance(made, Tensor) else made

            def again() -> None:
                fresh = op(*args, **kwargs)
                for old, new in zip(results, [fresh] if isinstance(fresh, Tensor) else fresh, strict=True):
                    old.copy_(new)

            self.noted.append(again)
        return made

    def place(self, tensor: Tensor) -> int:
        return 0

    def record(self, run: Any) -> graphs.Recording:
        self.recorded += 1
        self.noted = noted = []
        launch = launcher.launch
        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(launcher, "launch", lambda *args, **options: noted.append(lambda: launch(*args, **options)))
            results = run()

        def replay() -> None:
            self.replayed += 1
            for make in noted:
                make()

        return graphs.Recording(replay, results, 1000)


def net(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    torch.manual_seed(3)
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=bias), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


CASES = [
    {},
    {"momentum": 0.9, "relative_lr": True},
    {"momentum": 0.5, "relative_lr": True, "reset_momentum": True, "direction": "nesterov"},
    {"shuffle": False, "loss": "cross_entropy"},
    {"x": (X.abs() * 40).to(torch.uint8), "x_scale": 1 / 255},
    {"schedule": dk.RoundRobin(rounds=4, inner_epochs=1, inner_steps=2, parallel=True), "momentum": 0.9, "relative_lr": True},
]


def train(model: nn.Module, rounds: int = 4, x: Tensor = X, y: Tensor = Y, **more: Any) -> dk.History:
    settings = {
        "schedule": dk.RoundRobin(rounds=rounds, inner_epochs=1, inner_steps=2), "lr": 0.05, "batch_size": 5, "seed": 1,
        "backend": "triton",
    }  # fmt: skip
    return dk.fit(model, x, y, **(settings | more))


def numbers(model: nn.Module, history: dk.History) -> Tensor:
    """All that training leaves."""
    records = [[b.layer, b.steps, b.lr, b.loss, b.norm_mean, b.norm_min, b.norm_max] for b in history.blocks]
    return torch.cat(
        [torch.tensor(records, dtype=torch.float64).flatten(), *(p.detach().double().flatten() for p in model.parameters())]
    )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_shared", graphs.Graphs(recorder))
    return recorder


@pytest.mark.parametrize("how", CASES, ids=lambda how: "-".join(how) or "plain")
@pytest.mark.parametrize("at_once", [6, 8, 256])
def test_replayed_blocks_have_the_bits_of_block_after_block(how, at_once, recorder, monkeypatch):
    """At once one cycle of the layers' blocks, of which the last are of one step, or two, or all of a round."""
    monkeypatch.setattr(trainer, "LAUNCHES_AT_ONCE", at_once * launches_of_step(3))
    model = net(6, 5, 4, 3, bias="loss" not in how)
    plain, alone = copy.deepcopy(model), copy.deepcopy(model)
    ours = numbers(model, train(model, **how))
    cycles = {6: (2, 10), 8: (2, 6), 256: (1, 3)}[at_once]  # a round is two cycles of two steps a layer and one of one
    assert (recorder.recorded, recorder.replayed) == cycles
    monkeypatch.setenv("DANTE_CUDA_GRAPHS", "0")
    assert torch.equal(ours, numbers(plain, train(plain, **how)))
    assert recorder.replayed == cycles[1]
    monkeypatch.setattr(Trainer, "_block_launcher", lambda *args: None)
    assert torch.equal(ours, numbers(alone, train(alone, **how)))


def test_a_block_that_goes_on_into_the_next_pass_is_one_block(recorder, monkeypatch):
    """Its momentum is set back once: blocks of 2 of a pass of 5 steps."""
    how = {"schedule": dk.RoundRobin(rounds=8, inner_steps=2), "momentum": 0.9, "reset_momentum": True, "relative_lr": True}
    model = net(6, 5, 4, 3)
    alone = copy.deepcopy(model)
    ours = numbers(model, train(model, **how))
    assert recorder.replayed
    monkeypatch.setattr(Trainer, "_block_launcher", lambda *args: None)
    assert torch.equal(ours, numbers(alone, train(alone, **how)))


def test_relative_rates_are_times_the_norm_of_weight_and_bias_or_1_where_that_is_zero():
    weights = [
        torch.randn(5, 7),
        torch.zeros(4, 5),
        torch.full((3, 4), 1e15),
        torch.zeros(2, 3),
        torch.full((2, 2), float("nan")),
    ]
    biases = [torch.randn(5), torch.ones(4), None, None, torch.zeros(2)]
    exact = [
        torch.cat([part.double().flatten() for part in parts if part is not None]).norm()
        for parts in zip(weights, biases, strict=True)
    ]
    exact[3] += 1
    found = norms_or_one(weights, biases)
    torch.testing.assert_close(found.double(), torch.stack(exact), rtol=1e-6, atol=0, equal_nan=True)
    alone = [norms_or_one([weight], [bias]) for weight, bias in zip(weights, biases, strict=True)]
    assert torch.equal(found[:4], torch.cat(alone[:4]))


class Counter(TorchDispatchMode):
    """Counts torch's operations that launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.removeprefix("aten::")
        if not (op.is_view or name.startswith(("empty", "new_empty"))):
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))


def test_a_cycle_s_blocks_have_as_many_launches_beside_their_passes_as_the_model_says(monkeypatch):
    model, launched, lengths = net(6, 5, 4, 3), [], []
    layers = [dk.ops.Layer(one.weight.detach(), one.bias.detach(), "relu") for one in model[::2]]
    still, order = Velocity(None, None), torch.arange(23)
    monkeypatch.setattr(kernels, "sngd_epoch_", lambda *args: lengths.append(args[10]) or (torch.empty(0), torch.empty(0)))
    monkeypatch.setattr(launcher, "launch", lambda kernel, *args, **options: launched.append(kernel))

    def count(cycles: int) -> tuple[collections.Counter[str], int]:
        turns = [Block(layer, [Span(order, 0, 15)], 0.1) for _ in range(cycles) for layer in range(3)]
        one = Round(Launcher(kernels, None), layers, [still] * 3, X, Y, turns, 5, "mse", 0.0, False, True, False, 1.0, 3)
        arguments, counter = one.arguments(), Counter()
        launched.clear()
        with counter:
            _apart(kernels, *arguments)
        return counter.counts, len(launched)

    (some, products), (more, more_products) = count(2), count(3)
    of_a_cycle = more - some
    assert of_a_cycle == dict.fromkeys(("_foreach_copy_", "_foreach_norm", "stack", "hypot", "threshold", "mul"), 1)
    assert (
        of_a_cycle.total() + 2 == cost.CYCLE_LAUNCHES
    )  # a norm of many tensors is three: of pieces, of each tensor, and zeros
    assert more_products - products == 0 + 1 + 2  # of the layers before each
    assert all(
        length.data_ptr() % 16 == 0 for length in lengths
    )  # or kernels would be compiled once more for those that are not


def test_another_plan_is_another_recording_and_a_wrong_name_an_error_as_ever(recorder, monkeypatch):
    model, run, plans = net(6, 5, 4, 3), graphs.Graphs.run, []
    monkeypatch.setattr(
        graphs.Graphs, "run", lambda self, function, *rest: plans.append(function.__module__) or run(self, function, *rest)
    )
    for i, name in enumerate(("fused", "streamed", "fused")):
        monkeypatch.setenv("DANTE_GPU_PLAN", name)
        train(model)
        assert (f"dante_kernels.kernels.{name}" in plans) == (i < 2)  # all of the last one are replays
        plans.clear()
    monkeypatch.setenv("DANTE_GPU_PLAN", "nonsense")
    with pytest.raises(ValueError, match=r"DANTE_GPU_PLAN: expected one of auto, .*, got 'nonsense'"):
        train(model)


def test_blocks_are_recorded_on_the_device_of_their_tensors(recorder, monkeypatch):
    inside = []

    @contextlib.contextmanager
    def on_device_of(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    monkeypatch.setattr(kernels, "_on_device_of", on_device_of)
    placed, place = [], Recorder.place
    monkeypatch.setattr(Recorder, "place", lambda self, tensor: placed.append(bool(inside)) or place(self, tensor))
    train(net(6, 5, 4, 3))
    assert placed
    assert all(placed)


def test_autograd_is_told_that_weights_have_changed(recorder):
    model = net(6, 5, 4, 3)
    before = [p._version for p in model.parameters()]
    train(model)
    assert recorder.replayed
    # Once a call: two that are not recorded yet, ten replays.
    assert [p._version - version for p, version in zip(model.parameters(), before, strict=True)] == [4] * len(before)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_layer_that_stays_frozen_has_no_blocks_and_no_change(parallel, recorder, monkeypatch):
    how = {"schedule": dk.RoundRobin(rounds=4, inner_epochs=1, inner_steps=2, parallel=parallel), "momentum": 0.9}
    model = net(6, 5, 4, 3)
    model[2].requires_grad_(False)
    alone, frozen, version = copy.deepcopy(model), model[2].weight.clone(), model[2].weight._version
    ours = numbers(model, train(model, **how))
    assert recorder.replayed
    assert torch.equal(model[2].weight, frozen)
    assert model[2].weight._version == version
    monkeypatch.setattr(Trainer, "_block_launcher", lambda *args: None)
    assert torch.equal(ours, numbers(alone, train(alone, **how)))


@pytest.mark.parametrize(
    "apart",
    [
        {"prefix_budget": 5 * 15 * 4 - 1, "schedule": dk.RoundRobin(rounds=2, inner_epochs=1, inner_steps=3)},  # a byte too few
        {"schedule": dk.RoundRobin(rounds=2)},
        {"direction": "sgd"},
    ],
    ids=["budget", "whole passes", "torch's own rule"],
)
def test_what_is_better_apart_stays_apart(apart, recorder, monkeypatch):
    called = []
    monkeypatch.setattr(Trainer, "_run_blocks_at_once", lambda *args: called.append(1))
    train(net(6, 5, 4, 3), rounds=2, **apart)
    assert not called


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("budget", [{}, {"prefix_budget": 22 * 5 * 4}], ids=["encoded once", "encoded anew"])
def test_a_stacked_autoencoder_is_replayed_where_what_it_encodes_is_kept(budget, parallel, recorder, monkeypatch):
    """Its outer layer comes first, so that a block's suffix has changed in its cycle."""
    model = net(6, 5, 4, 5, 6)
    blocks = dk.StackedAutoencoder(rounds=4, inner_epochs=1, inner_steps=2, parallel=parallel)
    how = {"schedule": blocks, "y": X, "momentum": 0.9} | budget
    alone = copy.deepcopy(model)
    phases, run = set(), Trainer._run_blocks_at_once

    def run_blocks_at_once(self, launcher, phase, *args):
        phases.add(len(phase.encoder))
        return (yield from run(self, launcher, phase, *args))

    monkeypatch.setattr(Trainer, "_run_blocks_at_once", run_blocks_at_once)
    history = train(model, **how)
    assert {block.phase for block in history.blocks} == {0, 1}
    assert phases == ({0} if budget else {0, 1})
    assert recorder.replayed
    monkeypatch.setattr(Trainer, "_block_launcher", lambda *args: None)
    assert torch.equal(numbers(model, history), numbers(alone, train(alone, **how)))


def test_blocks_of_one_call_share_its_seconds_by_their_steps(recorder):
    history = train(net(6, 5, 4, 3), schedule=dk.RoundRobin(rounds=2, inner_epochs=1, inner_steps=2))
    for round_, record in enumerate(history.rounds):
        blocks = [block for block in history.blocks if block.round == round_]
        assert {block.steps for block in blocks} == {2, 1}
        assert max(b.seconds / b.steps for b in blocks) == pytest.approx(min(b.seconds / b.steps for b in blocks))
        assert 0 < sum(block.seconds for block in blocks) <= record.seconds


def test_streams_side_by_side_have_room_for_the_launches_that_wait_the_longest(recorder, monkeypatch):
    """Models of two and of three layers: of all their passes that one decides of which most programs wait for each other."""
    asked, counts = [], {(6, 5): 40, (5, 3): 7, (6, 4): 0, (4, 4): 30, (4, 3): 0}
    monkeypatch.setattr(kernels, "waiting_programs", lambda weights, *_: counts[weights[0].shape[1], weights[0].shape[0]])
    overlapping = kernels.overlapping
    monkeypatch.setattr(
        kernels, "overlapping", lambda tensor, jobs, waiting: asked.append((len(jobs), waiting)) or overlapping(tensor, jobs, 0)
    )
    blocks = dk.RoundRobin(rounds=1, inner_epochs=1, inner_steps=2, parallel=True)
    settings = {"lr": 0.05, "batch_size": 5, "backend": "triton", "schedule": blocks}
    for models, expected in (([net(6, 5, 3), net(6, 4, 4, 3)], 40), ([net(6, 4, 4, 3), net(6, 4, 4, 3)], 30)):
        asked.clear()
        dk.fit_many(models, X, Y, **settings)
        assert (2, expected) in asked


def test_a_model_that_no_plan_serves_does_not_end_the_others(recorder, monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", "persistent")
    models = [net(6, 5, 3), net(6, 5, 4, 4, 3), net(6, 5, 3)]
    alone = copy.deepcopy(models[2])
    blocks = dk.RoundRobin(rounds=1, inner_epochs=1, inner_steps=2, parallel=True)
    settings = {"lr": 0.05, "batch_size": 5, "backend": "triton", "schedule": blocks}
    with pytest.raises(dk.FitManyError, match="1 of 3 models") as caught:
        dk.fit_many(models, X, Y, **settings)
    assert [*caught.value.errors] == [1]
    dk.fit(alone, X, Y, **settings)
    assert all(torch.equal(p, q) for p, q in zip(models[2].parameters(), alone.parameters(), strict=True))
