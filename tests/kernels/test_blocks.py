"""Blocks of two layers in turn, and models side by side, in one launch of the persistent kernel."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from interleave import interleaved
from one_pass import MEET, ONLY_ARRIVE, WAIT, ends, mutant, tiles
from support import LOSSES, Problem, assert_error_rule, make_problem

from dante_kernels import kernels, losses, reference
from dante_kernels.kernels import barrier
from dante_kernels.ops import blocks
from dante_kernels.ops.layer import flatten

# layer, number of steps; all but each layer's first block go on where the last block of their layer stopped
TURNS = [(0, 1), (1, 2), (0, 2), (0, 1), (1, 1), (0, 1)]
RATES = [0.3, 0.2, 0.1, 0.2, 0.4, 0.1]


def schedule(rows: int, batch: int) -> torch.Tensor:
    """(steps, 4): each layer walks through the rows on its own, with a short last mini-batch, again and again."""
    cursors, table = [0, 0], []
    for block, (layer, steps) in enumerate(TURNS):
        for _ in range(steps):
            count = min(batch, rows - cursors[layer])
            table.append([cursors[layer] + layer * rows, count, layer, block])
            cursors[layer] = (cursors[layer] + count) % rows
    return torch.tensor(table)


def expected(p: Problem, order, table, dtype, momentum, nesterov, relative, reset, parallel=False):
    """What the reference makes of the blocks, one step after the other: both layers, their velocities, losses, norms.

    In parallel a block of the hidden layer after one of the last layer sees that one as it was before.
    """
    q = p.to(dtype)
    layers = [(q.weight, q.bias, q.activation), *q.suffix]
    velocities = [[torch.zeros_like(w), None if b is None else torch.zeros_like(b)] for w, b, _ in layers]
    results, current, acted, seen = [], -1, 0, layers[1]
    for first, count, layer, block in table.tolist():
        rows = order[first : first + count]
        weight, bias, phi = layers[layer]
        if block != current:
            if layer == 1 or acted == 0 or not parallel:
                seen = tuple(t.clone() if isinstance(t, torch.Tensor) and parallel else t for t in layers[1])
            rate = torch.tensor(RATES[block], dtype=dtype)
            if relative:
                norm = torch.cat([t.flatten() for t in (weight, bias) if t is not None]).norm()
                rate = rate * norm if norm else rate
            if reset:
                velocities[layer] = [None if v is None else torch.zeros_like(v) for v in velocities[layer]]
        current, acted = block, layer
        x = reference.layer_forward(q.x[rows], *layers[0]) if layer else q.x[rows]
        velocity = velocities[layer] if momentum else (None, None)
        problem = (weight, bias, x, q.target[rows], [seen] if layer == 0 else [], phi, losses.code(q.loss))
        results.append(reference.sngd_step_(*problem, rate, *velocity, momentum, nesterov))
    state = [
        t for (w, b, _), v in zip(layers, velocities, strict=True) for t in (w, b, *(v if momentum else ())) if t is not None
    ]
    return [*state, *(torch.stack(part) for part in zip(*results, strict=True))]


def run(
    p: Problem, batch, order, table, seed=0, momentum=0.0, nesterov=False, relative=False, reset=False, parallel=False, rows=16
):  # fmt: skip
    """The same by the kernel, in tiles of so many rows."""
    weights, biases, activations = flatten(p.suffix, p.activation)
    weights, biases = [p.weight, *weights], [p.bias, *biases]
    velocity_weights = [torch.zeros_like(w) if momentum else None for w in weights]
    velocity_biases = [None if b is None or not momentum else torch.zeros_like(b) for b in biases]
    call = (
        weights, biases, p.x, p.target, order, table, batch, activations, losses.code(p.loss), torch.tensor(RATES),
        velocity_weights, velocity_biases, momentum, nesterov, 1.0, relative, reset, 2 * parallel,
        tiles(p, batch)._replace(rows=rows),
    )  # fmt: skip
    with interleaved(seed):
        (result,) = kernels.sngd_blocks_([call])
    state = [t for four in zip(weights, biases, velocity_weights, velocity_biases, strict=True) for t in four if t is not None]
    return [*state, *result]


# one program; units split; inputs split; both; then the first and the last again with mini-batches of more tiles
SHAPES = [(40, (15, 10), 20), (40, (40, 10), 20), (70, (12, 7), 20), (70, (37, 10), 20), (40, (15, 10), 40), (70, (37, 10), 40)]
# and all but the first with mini-batches of one tile, which is what `fit` mostly gives
ROWS = [*((shape, 16) for shape in SHAPES), *((shape, 32) for shape in SHAPES[1:4])]


@pytest.mark.parametrize(("shape", "rows"), ROWS, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {}, {"momentum": 0.9, "relative": True}, {"momentum": 0.5, "nesterov": True, "reset": True},
        {"parallel": True}, {"momentum": 0.9, "relative": True, "parallel": True},
    ],
)  # fmt: skip
def test_blocks_are_those_of_the_reference(shape, rows, how):
    n_in, widths, batch = shape
    p = make_problem(seed=20, rows=50, n_in=n_in, widths=widths, loss=LOSSES[len(how) % 3], bias="nesterov" not in how)
    order = torch.cat([torch.randperm(50, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    table = schedule(50, batch)
    settings = {"momentum": 0.0, "nesterov": False, "relative": False, "reset": False} | how
    truths = [expected(p, order, table, dtype, **settings) for dtype in (torch.float32, torch.float64)]
    got = run(p, batch, order, table, rows=rows, **how)
    for i, (ours, theirs, exact) in enumerate(zip(got, *truths, strict=True)):
        assert_error_rule(f"result {i}", ours, theirs, exact)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_a_relative_rate_is_one_of_1_for_a_layer_of_norm_zero(shape):
    n_in, widths, batch = shape
    p = make_problem(seed=22, rows=50, n_in=n_in, widths=widths)
    for part in p.suffix[0][:2]:
        part.zero_()
    order, table = torch.arange(100) % 50, schedule(50, batch)
    settings = {"momentum": 0.9, "nesterov": False, "relative": True, "reset": False}
    truths = [expected(p, order, table, dtype, **settings) for dtype in (torch.float32, torch.float64)]
    got = run(p, batch, order, table, momentum=0.9, relative=True)
    assert got[2].any()
    for i, (ours, theirs, exact) in enumerate(zip(got, *truths, strict=True)):
        assert_error_rule(f"result {i}", ours, theirs, exact)


@pytest.mark.parametrize(("shape", "rows"), [ROWS[3], ROWS[5], *ROWS[-3:]], ids=str)
def test_unfair_schedules_give_the_same_bits(shape, rows, unfair):
    n_in, widths, batch = shape
    p = make_problem(seed=21, rows=50, n_in=n_in, widths=widths)
    order, table = torch.arange(100) % 50, schedule(50, batch)
    results = [
        torch.cat([t.flatten() for t in run(p.clone(), batch, order, table, seed, 0.9, relative=True, rows=rows)])
        for seed in unfair
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


# What blocks must not do without, as in test_persistent.py, and settings that need it.
BLOCK_MUTANTS = {
    "rates that are not relative": ("if RELATIVE:\n", 0, "if False:\n", {"relative": True}),
    "no wait for the sums of a relative rate": (MEET, 0, ONLY_ARRIVE, {"relative": True}),
    "no barrier for the sums of a relative rate": (MEET, 0, "pass\n", {"relative": True}),
    "no wait for those sums with one tile": (MEET, 0, ONLY_ARRIVE, {"relative": True, "rows": 32}),
    "no barrier for those sums with one tile": (MEET, 0, "pass\n", {"relative": True, "rows": 32}),
    "no wait for Z with one tile": (MEET, 1, ONLY_ARRIVE, {"rows": 32}),
    "no wait for the next layer with one tile": (MEET, 2, ONLY_ARRIVE, {"rows": 32}),
    "no wait for the norm with one tile": (WAIT, 1, "sense = ~sense\n", {"rows": 32}),
    "velocities that are kept": ("if RESET:\n", 0, "if False:\n", {"momentum": 0.5, "reset": True}),
    "the first block's rate for all": ("lr = tl.load(p_lr + block)", 0, "lr = tl.load(p_lr)", {}),
    "steps of the hidden layer alone": ("now = moves & (acted == 1)", 0, "now = moves & (acted == 2)", {}),
    "the last layer as it was": ("next_w, other_w = in_parallel(next_w, other_w, acted, layer)", 0, "pass", {"parallel": True}),
    "its bias as it was": (
        "next_bias, other_bias = in_parallel(next_bias, other_bias, acted, layer)",
        0,
        "pass",
        {"parallel": True},
    ),
    "the last layer as it is": ("next_w = tl.where(acted == 0, other_w, next_w)", 0, "pass", {"parallel": True}),
    "its bias as it is": ("next_bias = tl.where(acted == 0, other_bias, next_bias)", 0, "pass", {"parallel": True}),
}


@pytest.mark.parametrize("name", BLOCK_MUTANTS)
def test_the_schedules_see_what_blocks_lack(name, schedules, tmp_path, monkeypatch):
    monkeypatch.setattr("interleave.TURNS", 5000)
    old, nth, new, settings = BLOCK_MUTANTS[name]
    changed = functools.partial(kernels.one_launch.run, kernel=mutant(tmp_path, old, nth, new).persistent)
    p, order, table = make_problem(seed=21, rows=50, n_in=70, widths=(37, 10)), torch.arange(100) % 50, schedule(50, 20)
    right = run(p.clone(), 20, order, table, **settings)
    monkeypatch.setattr(kernels.one_launch, "run", changed)
    under = schedules if re.search("wait|barrier", name) else schedules[:1]  # the others are wrong under every schedule alike
    for seed in under:
        barrier._counters.clear()
        got = []
        ended = ends(lambda seed=seed, got=got: got.extend(run(p.clone(), 20, order, table, seed, **settings)))
        assert not (ended and all(torch.equal(a, b) for a, b in zip(got, right, strict=True)))
    barrier._counters.clear()


def test_a_step_that_must_not_move_moves_nothing():
    p = make_problem(seed=22, rows=50, n_in=70, widths=(20, 3), class_indices=True)
    table, order = schedule(50, 20)[:5], torch.arange(100) % 50
    first = run(p.clone(), 20, order, table[:1])
    p.target[20:] = 3  # no such class: every mini-batch but the first, and those of the other layer
    order[50:] = 30
    got = run(p, 20, order, table)
    assert got[-1][1:].isnan().all()
    p.target[20:] = 0
    assert torch.equal(got[-1][0], first[-1][0])


def calls_of(problems, batch, momentum):
    for i, p in enumerate(problems):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(i))
        velocity = (torch.full_like(p.weight, 0.1), torch.zeros_like(p.bias)) if momentum else (None, None)
        suffix, rate = flatten(p.suffix, p.activation), torch.tensor(0.1 * (i + 1))
        yield (
            p.weight, p.bias, p.x, p.target, order, batch, *suffix, losses.code(p.loss), rate, *velocity, momentum, False
        )  # fmt: skip


SIDE_BY_SIDE = [
    (150, (37, 10), 20), (150, (12,), 20), (150, (37, 10), 40), (40, (15, 10), 20), (150, (37, 20, 10), 20),
]  # fmt: skip


@pytest.mark.parametrize("shape", SIDE_BY_SIDE, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_models_side_by_side_have_the_bits_of_each_alone(shape, momentum, monkeypatch):
    n_in, widths, batch = shape
    monkeypatch.setattr(kernels, "_most_programs", lambda tensor: 12)
    problems = [make_problem(seed=23, rows=50, n_in=n_in, widths=widths)]
    problems += [make_problem(seed=s, rows=50, n_in=n_in, widths=widths, class_indices=False) for s in (25, 27)]
    problems[0].target = problems[1].target.clone()
    alone = [p.clone() for p in problems]
    apart, together = (list(calls_of(group, batch, momentum)) for group in (alone, problems))
    with interleaved(0):
        expected_ = [kernels.sngd_epochs_([call])[0] for call in apart]
    with interleaved(1) as grids:
        got = kernels.sngd_epochs_(together)
    how = kernels.plan.persistent(kernels.plan.Shape((n_in, *widths), batch, momentum=momentum > 0), 12)
    programs, at_once = how.programs, how.at_once(12)
    assert at_once in (1, 2) or 3 * programs <= 24
    assert grids == {1: [programs] * 3, 2: [2 * programs, programs]}.get(at_once, [3 * programs])
    for p, q, call, other, ours, theirs in zip(problems, alone, together, apart, got, expected_, strict=True):
        assert torch.equal(p.weight, q.weight)
        assert torch.equal(p.bias, q.bias)
        assert torch.equal(torch.cat(ours), torch.cat(theirs))
        assert not momentum or torch.equal(call[11], other[11])


# What gives each model its own, what takes it away, and the widths of a net that needs it.
OWN = [(own, own.replace("model", "0 * model"), (37, 10)) for own in (
    "p_counter += model * SPACING", "p_sums += model", "p_next_z += model", "p_z += (model *",
)]  # fmt: skip
OWN.append(("(SPLIT_OUT + HAS_LAST) * next_size", "SPLIT_OUT * next_size", (37, 20, 10)))


@pytest.mark.parametrize(("what", "taken", "widths"), OWN, ids=[own for own, *_ in OWN])
def test_the_schedules_see_models_that_share_what_is_each_ones_own(what, taken, widths, schedules, tmp_path, monkeypatch):
    monkeypatch.setattr("interleave.TURNS", 5000)
    monkeypatch.setattr(kernels, "_most_programs", lambda tensor: 20)
    changed = mutant(tmp_path, what, 0, taken)
    problems = [make_problem(seed=s, rows=50, n_in=150, widths=widths, class_indices=False) for s in (25, 27)]
    right = [p.clone() for p in problems]
    with interleaved(0) as grids:
        kernels.sngd_epochs_(list(calls_of(right, 40, 0.0)))
    assert len(grids) == 1
    monkeypatch.setattr(kernels.one_launch, "run", functools.partial(kernels.one_launch.run, kernel=changed.persistent))
    for seed in schedules:
        barrier._counters.clear()
        got = [p.clone() for p in problems]
        with interleaved(seed):
            ended = ends(lambda got=got: kernels.sngd_epochs_(list(calls_of(got, 40, 0.0))))
        assert not (ended and all(torch.equal(p.weight, q.weight) for p, q in zip(got, right, strict=True)))
    barrier._counters.clear()


def rounds_of(problems: list[Problem], momentum: float, cycle: int = 0) -> list[blocks.Round]:
    """A round of two blocks of each layer, for each model with an order, rates and velocities of its own."""
    found = []
    for i, p in enumerate(problems):
        layers = [blocks.Layer(p.weight, p.bias, p.activation), p.suffix[0]]
        orders = [torch.randperm(50, generator=torch.Generator().manual_seed(10 * i + layer)) for layer in range(2)]
        turns = [
            blocks.Block(layer, [blocks.Span(orders[layer], start, start + 25)], 0.1 * (i + 1 + layer))
            for start in (0, 25) for layer in range(2)
        ]  # fmt: skip
        velocities = [
            blocks.Velocity(torch.full_like(w, 0.1 * i), torch.zeros_like(b)) if momentum else blocks.Velocity(None, None)
            for w, b, _ in layers
        ]
        launcher = blocks.Launcher(kernels, tiles(p, 20)._replace(rows=16))
        found.append(
            blocks.Round(
                launcher, layers, velocities, p.x, p.target, turns, 20, p.loss, momentum, False, True, False, 1.0, cycle
            )
        )
    return found


@pytest.mark.parametrize(("momentum", "at_once", "cycle"), [(0.0, 2, 0), (0.9, 3, 2)])
def test_rounds_side_by_side_have_the_bits_of_each_alone(momentum, at_once, cycle, monkeypatch):
    problems = [make_problem(seed=s, rows=50, n_in=70, widths=(37, 10), class_indices=False) for s in (28, 29, 30)]
    alone = [p.clone() for p in problems]
    programs = tiles(problems[0], 20).programs  # of 4 warps each, two on a multiprocessor
    assert programs > 1
    monkeypatch.setattr(kernels, "_most_programs", lambda tensor: (at_once * programs + 1) // 2)
    apart, together = rounds_of(alone, momentum, cycle), rounds_of(problems, momentum, cycle)
    expected_ = []
    for one in apart:
        with interleaved(0):
            expected_ += blocks.sngd_blocks_([one])
    with interleaved(1) as grids:
        got = blocks.sngd_blocks_(together)
    assert grids == {3: [3 * programs], 2: [2 * programs, programs]}[at_once]
    for one, other, ours, theirs in zip(together, apart, got, expected_, strict=True):
        assert all(map(torch.equal, ours, theirs))
        for now, then in zip(one.changed, other.changed, strict=True):
            assert now is then is None or torch.equal(now, then)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_round_s_mini_batch_is_no_larger_than_x_as_its_tiles_were_chosen(shuffled):
    p = make_problem(seed=31, rows=50, n_in=20, widths=(12, 7))
    (one,) = rounds_of([p], 0.0)
    order = torch.arange(50) if shuffled else None
    passes = [blocks.Span(order, 0, 50), blocks.Span(None if order is None else order.clone(), 0, 50)]
    arguments = one._replace(blocks=[blocks.Block(0, passes, 0.1)], batch_size=60).arguments()
    assert arguments[6] == 50
    assert arguments[blocks.TABLE][:, 1].tolist() == [50, 50]


def test_rounds_of_another_shape_or_rule_are_launches_of_their_own_and_errors_are_each_ones_own(monkeypatch):
    problems = [make_problem(seed=s, rows=50, n_in=70, widths=(37, 10), class_indices=False) for s in range(5)]
    monkeypatch.setattr(kernels, "_most_programs", lambda tensor: 1000)
    rounds = rounds_of(problems, 0.0)
    rounds[1] = rounds[1]._replace(blocks=rounds[1].blocks[:2])
    rounds[2] = rounds[2]._replace(x_scale=float("nan"))
    rounds[4] = rounds[4]._replace(relative_lr=False)
    before = problems[2].weight.clone()
    programs = tiles(problems[0], 20).programs
    with interleaved(1) as grids:
        got = blocks.sngd_blocks_(rounds)
    assert grids == [2 * programs, programs, programs]  # the first with the fourth
    assert [isinstance(one, Exception) for one in got] == [False, False, True, False, False]
    assert "x_scale" in str(got[2])
    assert torch.equal(problems[2].weight, before)
    assert [len(one[0]) for i, one in enumerate(got) if i != 2] == [8, 4, 8, 8]


@pytest.mark.parametrize("wrong", ["momentum", "velocity", "weight that shares its memory"])
def test_what_is_wrong_is_said_before_anything_changes_and_changes_are_counted(wrong):
    p = make_problem(seed=24, rows=40, n_in=15, widths=(10, 7))
    layers = [blocks.Layer(p.weight, p.bias, "relu"), blocks.Layer(p.suffix[0][0], p.suffix[0][1], "relu")]
    turns = [blocks.Block(layer, [blocks.Span(None, 0, 40)], 0.1) for layer in range(2)]
    launcher = blocks.Launcher(kernels, tiles(p, 20)._replace(rows=16))

    def run(last, momentum, velocities):
        one = blocks.Round(
            launcher, [layers[0], last], velocities, p.x, p.target, turns, 20, "mse", momentum, False, False, False, 1.0
        )
        return blocks.sngd_blocks_([one])[0]

    still = [blocks.Velocity(None, None)] * 2
    before = [t.clone() for layer in layers for t in layer[:2]]
    last, momentum, velocities = {
        "momentum": (layers[1], 0.9, still),
        "velocity": (layers[1], 0.9, [blocks.Velocity(torch.zeros(3), None)] * 2),
        "weight that shares its memory": (layers[1]._replace(weight=p.suffix[0][0][:1].expand(7, 10)), 0.0, still),
    }[wrong]
    error = run(last, momentum, velocities)
    assert isinstance(error, ValueError | TypeError)
    assert re.search("velocity_weight|velocity_bias|weight", str(error))
    assert all(torch.equal(now, t) for now, t in zip((t for layer in layers for t in layer[:2]), before, strict=True))
    versions = [t._version for layer in layers for t in layer[:2]]
    with interleaved(0):
        run(layers[1], 0.0, still)
    assert all(t._version > version for t, version in zip((t for one in layers for t in one[:2]), versions, strict=True))
