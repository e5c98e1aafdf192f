"""The persistent plan: a whole pass in one launch, alone and with many programs that wait for each other.

Several programs run interleaved by an unfair seeded schedule (`interleave.py`). Without a wait, a barrier or the second
half of the exchange buffer the same schedules give wrong weights, and the tests say so.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from interleave import Deadlock, interleaved
from one_pass import MEET, ONLY_ARRIVE, WAIT, assert_pass_is_right, ends, mutant, one_barrier_tiles, run, tiles, wide_tiles
from passes import LR, arguments_of, rule_of, truth
from support import ACTIVATIONS, LOSSES, Problem, as_float32, make_problem

from dante_kernels import kernels, losses
from dante_kernels.kernels import barrier, launcher, one_launch, persistent, plan
from dante_kernels.kernels.fused import Call
from dante_kernels.ops.layer import flatten

# (n_in, widths): alone; units split; inputs split; both, with and without a next layer, and with two
SHAPES = [(40, (15, 10)), (40, (40, 10)), (150, (12, 7)), (150, (37, 10)), (150, (37,)), (150, (12,)), (30, (40,))]
DEEP = [(40, (15, 12, 10)), (40, (40, 70, 10)), (150, (12, 130, 7)), (150, (37, 70, 10))]
# For the form with one barrier: with and without a next layer; units that fill a tile and those that do not.
GRAM_SHAPES = [(70, (37, 10)), (150, (16, 7)), (70, (37,)), (150, (12,))]
# Each form on a small net, of 70 inputs.
FORMS_AND_WIDTHS = [
    pytest.param(tiles, (20, 3), id="tiles"),
    pytest.param(one_barrier_tiles, (20, 3), id="one_barrier"),
    pytest.param(tiles, (20, 18, 3), id="deep"),
    pytest.param(wide_tiles, (20, 3), id="wide"),
]
FORMS = pytest.mark.parametrize(("form", "widths"), FORMS_AND_WIDTHS)
SPLITS = [(tiles, shape) for shape in SHAPES + DEEP] + [(one_barrier_tiles, shape) for shape in GRAM_SHAPES]
WIDE = [(wide_tiles, shape) for shape in SHAPES]


@pytest.mark.parametrize(("form", "shape"), SPLITS + WIDE, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("loss", LOSSES)
def test_a_pass_is_right_for_every_split_and_loss(form, shape, loss):
    n_in, widths = shape
    p = make_problem(seed=3, rows=47, n_in=n_in, widths=widths, loss=loss)
    how = form(p, 20)
    if loss == "cross_entropy" and len(widths) == 1 and how.split_out > 1:
        pytest.skip("a softmax row must lie in one program")
    assert_pass_is_right(p, 20, how)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("form", "widths"), [*itertools.product((tiles, one_barrier_tiles, wide_tiles), [(37, 10), (12,)]), (tiles, (37, 70, 10))]
)
def test_a_pass_is_right_for_every_activation(form, widths, activation):
    p = make_problem(seed=4, rows=33, n_in=70, widths=widths, activation=activation)
    if len(widths) > 2:  # each layer has one of its own
        others = [phi for name, phi in ACTIVATIONS.items() if name != activation]
        p.suffix = [layer._replace(activation=other) for layer, other in zip(p.suffix, others, strict=False)]
    assert_pass_is_right(p, 16, form(p, 16))


@FORMS
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 32, 61])
def test_momentum_bias_and_tails(form, widths, nesterov, bias, rows):
    p = make_problem(seed=9, rows=rows, n_in=70, widths=widths, bias=bias)  # where a single row's residual does not cancel
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    assert_pass_is_right(p, 32, form(p, 32), momentum=0.9, nesterov=nesterov, order=order)


@pytest.mark.parametrize("shape", SHAPES + DEEP, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_mini_batch_of_several_tiles(shape, loss):
    n_in, widths = shape
    p = make_problem(seed=13, rows=110, n_in=n_in, widths=widths, loss=loss, activation="tanh")
    how = tiles(p, 70)
    if loss == "cross_entropy" and len(widths) == 1 and how.split_out > 1:
        pytest.skip("a softmax row must lie in one program")
    order = torch.randperm(110, generator=torch.Generator().manual_seed(0))
    assert_pass_is_right(p, 70, how, order=order, momentum=0.9)


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_strides_and_narrow_data(form, widths, dtype):
    p = make_problem(seed=6, rows=40, n_in=70, widths=widths, class_indices=False, uint8=dtype == torch.uint8)
    p.x = p.x.to(dtype)
    straight = as_float32(p)
    expected = truth(straight, 20, torch.float32)
    run(straight, 20, form(p, 20))
    p.weight, p.x, p.target = p.weight.t().contiguous().t(), p.x.t().contiguous().t(), p.target[:, [0, 1, 2]]
    p.bias, *biases = (torch.stack([b, b], dim=1)[:, 0] for b in (p.bias, *(layer.bias for layer in p.suffix)))
    p.suffix = [
        layer._replace(weight=layer.weight.t().contiguous().t(), bias=bias)
        for layer, bias in zip(p.suffix, biases, strict=True)
    ]
    run(p, 20, form(p, 20))
    assert torch.equal(p.weight, straight.weight)
    torch.testing.assert_close(p.weight, expected[0], rtol=1e-5, atol=1e-6)


REAL = [(98, (100, 10), 20), (98, (100,), 20), (784, (10,), 20)]


TILED = [(*SHAPES[2], 40), (*SHAPES[3], 70), (*DEEP[1], 20), (*DEEP[2], 20), (*DEEP[3], 40)]


UNFAIR = [
    *[(tiles, case) for case in [*[(n_in, widths, 20) for n_in, widths in SHAPES[1:5]], *TILED, *REAL]],
    *[(wide_tiles, (*shape, 20)) for shape in SHAPES[1:5]],
]


@pytest.mark.parametrize(("form", "case"), UNFAIR, ids=lambda value: getattr(value, "__name__", str(value)))
def test_unfair_schedules_give_the_same_bits(form, case, unfair):
    n_in, widths, batch = case
    p = make_problem(seed=7, rows=2 * batch + 5, n_in=n_in, widths=widths)
    results = [assert_pass_is_right(p.clone(), batch, form(p, batch), seed=seed, momentum=0.9) for seed in unfair]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_paper_s_net_with_its_49_programs():
    p = make_problem(seed=8, rows=27, n_in=784, widths=(100, 10))
    how = plan.persistent(plan.Shape((784, 100, 10), 20), 132)
    assert (how.split_out, how.split_in) == (7, 7)
    assert_pass_is_right(p, 20, how)


ONE_TILE = [(50, plan.TALL[0], "ieee"), (100, plan.TALL[-1], "ieee")]
ONE_TILE += [(20, plan.MATRIX_WIDE[0], "tf32"), (50, plan.MATRIX_WIDE[-1], "tf32"), (100, plan.MATRIX[-1], "tf32")]


@pytest.mark.parametrize(("batch", "sizes", "precision"), ONE_TILE, ids=str)
def test_a_mini_batch_of_many_rows_is_one_tile(batch, sizes, precision, monkeypatch):
    p = make_problem(seed=8, rows=2 * batch + 30, n_in=150, widths=(37, 10))
    how = plan._persistent((150, 37, 10), batch, sizes, plan.H200, precision=precision)
    whole, launch = [], launcher.launch
    monkeypatch.setattr(launcher, "launch", lambda *a, **options: whole.append(options["ONE_TILE"]) or launch(*a, **options))
    assert_pass_is_right(p, batch, how, momentum=0.9)
    assert whole == [True]


@pytest.mark.parametrize(
    ("form", "widths", "batch"),
    [
        (tiles, (20, 3), 20),
        (tiles, (20, 3), 40),
        (tiles, (20, 18, 3), 20),
        (one_barrier_tiles, (20, 3), 20),
        (tiles, (20,), 20),
    ],
)
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_an_infinite_x_saturates_units_and_no_others(form, widths, batch, name):
    """Where a layer does not fill its tile, what it lacks has weights of 0, and 0 times infinity is no number."""
    p = make_problem(seed=8, rows=40, n_in=70, widths=widths, activation=name)
    p.x[3, 5] = float("inf")
    *_, expected, _ = truth(p, batch, torch.float64)
    before = p.weight.clone()
    loss, norm = run(p, batch, form(p, batch))
    assert loss.isfinite().all()
    torch.testing.assert_close(loss[0], expected[0].float())
    assert norm[0].isnan()
    assert torch.equal(p.weight, before) == (batch == 40)


def test_a_hidden_unit_beyond_float32_saturates_the_next_layer_and_no_more():
    p = make_problem(seed=8, rows=20, n_in=20, widths=(15, 12, 3), activation="relu")
    p.suffix[0] = p.suffix[0]._replace(activation=ACTIVATIONS["tanh"])
    p.x[3], p.weight[0] = 1e20, 1e30
    *_, expected, expected_norm = truth(p, 20, torch.float32)
    loss, norm = run(p, 20, tiles(p, 20))
    assert norm.isfinite().all()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(norm, expected_norm)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("widths", [(600, 130, 10), (3072, 512, 10)], ids=str)
def test_the_largest_tiles(widths, momentum, request):
    if widths[0] == 3072 and not request.config.getoption("--nightly"):
        pytest.skip("40 seconds: with --nightly")
    how = plan._persistent(widths, 20, plan.LARGE[0], plan.H200, momentum > 0)
    n_in, *rest = widths
    assert_pass_is_right(make_problem(seed=8, rows=23, n_in=n_in, widths=rest), 20, how, momentum=momentum)


@pytest.mark.parametrize(
    ("form", "shape"), [*SPLITS[1:5], *SPLITS[7:13], *WIDE[2:5]], ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_pass_gives_the_bits_of_its_steps(form, shape):
    n_in, widths = shape
    p = make_problem(seed=9, rows=50, n_in=n_in, widths=widths)
    q, how = p.clone(), form(p, 20)
    losses_, norms = run(p, 20, how)
    for step, rows in enumerate(torch.arange(50).split(20)):
        loss, norm = run(q, len(rows), how, seed=step, order=rows)
        assert torch.equal(torch.cat([loss, norm]), torch.stack([losses_[step], norms[step]]))
    assert torch.equal(p.weight, q.weight)
    assert torch.equal(p.bias, q.bias)


def test_models_side_by_side_keep_their_own_velocities():
    problems = [make_problem(seed=seed, rows=45, n_in=70, widths=(37, 10), class_indices=True) for seed in range(2)]
    how = wide_tiles(problems[0], 20)
    alone, together = (
        [Call(*arguments_of(p, 20, rule=rule_of(p, 0.9))) for p in ps] for ps in ([p.clone() for p in problems], problems)
    )

    def launch(calls):
        one = calls[0]
        return one_launch.run([one_launch.model(c) for c in calls], one.layers, 20, one.loss, 0.9, False, 1.0, how)

    with interleaved(0):
        expected = [launch([call])[0] for call in alone]
    with interleaved(1) as grids:
        results = launch(together)
    assert grids == [2 * how.programs]
    for one, other, got, wanted in zip(together, alone, results, expected, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.velocity_weight, other.velocity_weight)
        assert torch.equal(torch.stack(got), torch.stack(wanted))


@FORMS
def test_a_bad_row_or_a_zero_gradient_changes_nothing(form, widths):
    p = make_problem(seed=10, rows=40, n_in=70, widths=widths, class_indices=True)
    p.target[25] = 3  # no such class
    first, order = p.clone(), torch.arange(40)
    losses_, norms = run(p, 20, form(p, 20))
    run(first, 20, form(p, 20), order=order[:20])
    assert torch.equal(p.weight, first.weight)
    assert norms[1].isnan()
    assert losses_[1].isnan()
    p.target[25], order[30] = 0, 40  # the class exists now, a row does not
    second = p.clone()
    _, norms = run(p, 20, form(p, 20), order=order[20:])
    assert norms.isnan().all()
    assert torch.equal(p.weight, second.weight)
    last = p.suffix[-1]._replace(weight=torch.zeros(3, widths[-2]), bias=torch.zeros(3))
    p.target, p.suffix = torch.zeros(40, 3), [*p.suffix[:-1], last]
    _, norms = run(p, 20, form(p, 20), rule=(torch.ones(20, 70), torch.ones(20), 0.9, True))
    assert (norms == 0).all()
    assert torch.equal(p.weight, second.weight)


# What the kernel must not do without, as (what, nth occurrence, replacement), and a problem that needs it: shape, batch.
MUTANTS = {
    "no wait for Z": (MEET, 1, ONLY_ARRIVE, SHAPES[2], 10),
    "no barrier for Z": (MEET, 1, "pass\n", SHAPES[2], 10),
    "no wait for the next layer": (MEET, 2, ONLY_ARRIVE, SHAPES[1], 10),
    "no barrier for the next layer": (MEET, 2, "pass\n", SHAPES[1], 10),
    "no wait for the tiles of Z": (MEET, 3, ONLY_ARRIVE, SHAPES[2], 40),
    "no barrier for the tiles of Z": (MEET, 3, "pass\n", SHAPES[2], 40),
    "no wait for the sums of Z": (MEET, 4, ONLY_ARRIVE, SHAPES[3], 40),
    "no barrier for the sums of Z": (MEET, 4, "pass\n", SHAPES[3], 40),
    "no wait for the next layer's sums": (MEET, 5, ONLY_ARRIVE, DEEP[1], 20),
    "no barrier for the next layer's sums": (MEET, 5, "pass\n", DEEP[1], 20),
    "no wait for D": (MEET, 6, ONLY_ARRIVE, DEEP[2], 20),
    "no barrier for D": (MEET, 6, "pass\n", DEEP[2], 20),
    "no wait for the norm": (WAIT, 1, "sense = ~sense\n", SHAPES[3], 10),
    "no wait where it is the only one": (WAIT, 1, "sense = ~sense\n", SHAPES[6], 10),
    "one half of the exchange buffer": ("(step % 2)", 1, "0", SHAPES[6], 10),
    "a slice that does not end": (
        "n_in, local_input)\n",
        0,
        "n_in, local_input); m_column = column < n_in\n",
        (70, (12, 7)),
        10,
    ),
}


def passes_unseen(p: Problem, batch: int, seed: int, module, right: torch.Tensor) -> bool:
    """Whether a changed kernel comes to its end with the right bits."""
    barrier._counters.clear()
    return ends(lambda: run(p, batch, tiles(p, batch), seed=seed, module=module)) and torch.equal(p.weight, right)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_schedules_see_what_is_missing(name, schedules, tmp_path, monkeypatch):
    monkeypatch.setattr("interleave.TURNS", 3000)
    old, nth, new, (n_in, widths), batch = MUTANTS[name]
    module = mutant(tmp_path, old, nth, new)
    p = make_problem(seed=11, rows=3 * batch, n_in=n_in, widths=widths)
    right = p.clone()
    run(right, batch, tiles(p, batch))
    assert not any(passes_unseen(p.clone(), batch, seed, module, right.weight) for seed in schedules)
    barrier._counters.clear()


def test_a_launch_goes_on_from_the_sign_that_the_last_one_left(schedules, tmp_path, monkeypatch):
    monkeypatch.setattr("interleave.TURNS", 3000)
    module = mutant(tmp_path, "sense = tl.load(p_counter, volatile=True)\n", 0, "pass\n")
    p = make_problem(seed=11, rows=10, n_in=30, widths=(40,))
    for seed in schedules:
        barrier._counters.clear()
        problems = [p.clone() for _ in range(4)]
        for q, kernel in zip(problems, (persistent, persistent, persistent, module), strict=True):
            (counter,) = list(barrier._counters.values()) or [torch.zeros(1)]
            assert (counter[0] < 0) == (q is problems[1] or q is problems[3])  # one barrier a launch turns it
            ended = ends(functools.partial(run, q, 10, tiles(p, 10), seed=seed, module=kernel))
        assert torch.equal(problems[0].weight, problems[1].weight)
        assert not (ended and torch.equal(problems[0].weight, problems[3].weight))
    barrier._counters.clear()


def test_a_barrier_that_waits_for_too_many_is_seen_to_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("interleave.TURNS", 3000)
    module = mutant(tmp_path, "arrive(p_counter, program, PROGRAMS)\n", 1, "arrive(p_counter, program, PROGRAMS + 1)\n")
    p = make_problem(seed=11, rows=10, n_in=150, widths=(12, 7))
    with pytest.raises(Exception, match="never end") as caught:
        run(p, 10, tiles(p, 10), module=module)
    assert caught.type is Deadlock or "Deadlock" in str(caught.value)
    barrier._counters.clear()


def explore(programs: int, steps: int, first=lambda programs: 2**31 - (programs - 1), start: int = 0) -> set[str]:
    """All interleavings of `programs` that pass `steps` barriers of `arrive` and `wait`: what can go wrong.

    A state is the counter and each program's place: 2 g before it arrives at barrier g, 2 g + 1 while it waits there. The
    sign that it waits to see changed is that of `start`, turned once for every barrier behind it.
    """
    wrong, seen, stack = set(), set(), [(start, (0,) * programs)]
    while stack:
        state = stack.pop()
        if state in seen:
            continue
        seen.add(state)
        counter, places = state
        moved = False
        for i, place in enumerate(places):
            generation, waits = divmod(place, 2)
            if generation == steps:
                continue
            if not waits:
                counted = (counter + (first(programs) if i == 0 else 1)) % 2**32
                following = (counted, (*places[:i], place + 1, *places[i + 1 :]))
            elif counter >> 31 != ((start >> 31) + generation) % 2:
                if any(other < 2 * generation + 1 for other in places):
                    wrong.add("passed before all had arrived")
                following = (counter, (*places[:i], place + 1, *places[i + 1 :]))
            else:
                continue
            moved = True
            stack.append(following)
        if not moved and any(place < 2 * steps for place in places):
            wrong.add("deadlock")
        if all(place == 2 * steps for place in places) and counter % 2**31:
            wrong.add("not at rest")
    return wrong


@pytest.mark.parametrize("start", [0, 2**31])
@pytest.mark.parametrize("programs", [2, 3, 4])
def test_the_barrier_is_right_in_every_interleaving(programs, start):
    assert not explore(programs, 4, start=start)
    assert "passed before all had arrived" in explore(programs, 4, lambda n: 2**31 - (n - 2), start)
    assert "deadlock" in explore(programs, 4, lambda n: 2**31 - n, start)


def test_the_model_chooses_only_what_fits():
    everything = itertools.product(
        (10, 64, 784, 3072), (1, 10, 100, 400, 1024), ((), (10,), (100,), (200, 10)), (1, 20, 33, 500), LOSSES, (1, 132)
    )
    served = 0
    for n_in, n_out, suffix, batch, loss, most in everything:
        widths = (n_in, n_out, *suffix)
        how = plan.persistent(plan.Shape(widths, batch, losses.code(loss)), most)
        if how is None:
            continue
        served += 1
        assert how.programs <= most
        assert how.split_out * how.units >= n_out
        assert how.split_in * how.slices * how.inputs >= n_in
        assert not suffix or how.next_units * (how.slices if suffix[1:] else 1) >= suffix[0]
        assert not suffix[1:] or how.last_units >= suffix[1]
        assert suffix or loss != "cross_entropy" or how.split_out == 1
        assert how.microseconds >= 0
    assert served > 50
    for widths in ((784, 100, 10, 10, 10), (784, 100, 257, 10), (784, 100, 10, 17), (12288, 3072, 10)):
        assert plan.persistent(plan.Shape(widths, 20), 132) is None


def test_a_small_layer_takes_the_plan_and_agrees_with_the_fused_one(monkeypatch):
    launched = []
    monkeypatch.setattr(one_launch, "run", lambda *a, run=one_launch.run: launched.append(1) or run(*a))
    results = []
    for wanted in ("auto", "fused"):
        monkeypatch.setenv("DANTE_GPU_PLAN", wanted)
        p = make_problem(seed=12, rows=50, n_in=40, widths=(15, 10))
        arguments = (p.weight, p.bias, p.x, p.target, None, 20, *flatten(p.suffix, p.activation), losses.code(p.loss))
        results.append([p.weight, p.bias, *kernels.sngd_epoch_(*arguments, torch.tensor(LR))])
    assert launched == [1]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_unknown_plan_is_refused(monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", "fast")
    p = make_problem(seed=12)
    with pytest.raises(
        ValueError, match="DANTE_GPU_PLAN: expected one of auto, persistent, streamed, fused, library, got 'fast'"
    ):
        kernels.sngd_step_(p.weight, p.bias, p.x, p.target, *flatten(p.suffix, p.activation), 0, torch.tensor(LR))
