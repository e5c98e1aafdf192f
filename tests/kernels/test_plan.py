"""The cost model and the plan that it chooses: pure arithmetic, no kernel runs."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
from pathlib import Path

import pytest
import torch

from dante_kernels import losses
from dante_kernels.kernels import cost, plan, tiling
from dante_kernels.kernels.plan import H200, Shape

ROOT = Path(__file__).parent.parent.parent
MODELS = {"fused": cost.fused, "streamed": cost.streamed, "library": cost.library, "plain": cost.plain}


def choose(widths, batch, *, most_programs=132, wanted="auto", **rest) -> plan.Choice:
    return plan.choose(Shape(tuple(widths), batch, **rest), H200, most_programs, wanted)


def tiles_of(shape: Shape) -> list[tiling.Tiles]:
    """The fused step's tiles, which depend on the widths."""
    pairs = list(itertools.pairwise(shape.widths))
    forward = [tiling.step_product(n, k, shape.precision) for k, n in pairs]
    backward = [tiling.step_product(k, n, shape.precision) for k, n in pairs[1:]]
    return [*forward, *backward, tiling.gradient_product(*reversed(shape.widths[:2]), shape.x_dtype, shape.precision)]


def streamed_rules(shape: Shape) -> list:
    """The streamed plan's tiles and what else its rules decide, which depend on the mini-batch too."""
    n_in, n_out, *_ = shape.widths
    w_tiles = tiling.streamed_product(n_out, n_in, shape.precision)
    batch, pairs = shape.batch, itertools.pairwise(shape.widths)
    look_ahead = tiling.next_block(batch) if batch <= tiling.NEXT_ROWS else None
    gram = tiling.by_gram(n_out, n_in, batch) and tiling.gram_tiles(batch, n_out, n_in)
    library = [tiling.library(n, k, shape.precision) for k, n in pairs]
    return [*tiles_of(shape), w_tiles, tiling.streamed_share(n_out, n_in, w_tiles), look_ahead, gram, library]


def library_rules(shape: Shape) -> list:
    """The tiles of what the library plan launches, and which products it leaves to torch."""
    return [*tiles_of(shape), [tiling.worth_a_launch(n, k, shape.batch) for k, n in itertools.pairwise(shape.widths)]]


RULES = {"fused": tiles_of, "streamed": streamed_rules, "library": library_rules, "plain": lambda shape: None}


GROWING = [1, 2, 7, 8, 31, 32, 33, 127, 128, 129, 500, 783, 784, 785, 1000, 1500, 2047, 2048, 2049, 4000, 12288]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_more_rows_or_weights_are_never_faster_with_the_same_tiles(name, momentum, precision):
    for vary, base in itertools.product(range(4), ((784, 100, 10), (3072, 512, 40), (12288, 3072, 200))):
        previous = None
        for size in GROWING:
            widths, batch = list(base), 100
            if vary < 3:
                widths[vary] = size
            else:
                batch = size
            shape = Shape(tuple(widths), batch, momentum=momentum, precision=precision)
            found = MODELS[name](shape, H200)
            if previous is not None and RULES[name](shape) == RULES[name](previous[0]):
                assert found.microseconds >= previous[1] - 1e-9, (shape, previous)
            previous = shape, found.microseconds


@pytest.mark.parametrize("name", MODELS)
def test_the_longest_part_is_the_limit(name):
    small, large = Shape((784, 100, 10), 20), Shape((12288, 3072, 10), 20, precision="medium")
    assert MODELS[name](small, H200).limit == "launches"
    endless = H200._replace(launch=0.0, l2=1e9, l2_per_multiprocessor=1e9)
    assert MODELS[name](large, endless).limit == "memory"
    assert MODELS[name](large, endless._replace(l2_bytes=10**12, memory=1e9)).limit == "arithmetic"
    assert MODELS[name](large, H200._replace(launch=0.0, l2_bytes=10**12, bf16=1e9, tf32=1e9, float64=1e9)).limit == "L2"


def test_a_wave_more_takes_a_wave_longer():
    """133 programs on 132 multiprocessors take twice as long as 132."""
    one, two = (cost._total([cost.Launch(programs, 1e6, 0, 0)], 0, H200).microseconds for programs in (132, 133))
    assert two - H200.launch == pytest.approx(2 * (one - H200.launch))


@pytest.mark.parametrize(("widths", "loss"), [((784, 100, 10), 0), ((784,), 0), ((60, 784), 1), ((40, 30, 20, 10), 0)])
def test_the_model_counts_the_launches_that_are_made(widths, loss, monkeypatch):
    from support import LOSSES, make_problem

    from dante_kernels import kernels
    from dante_kernels.kernels import launcher
    from dante_kernels.ops.layer import flatten

    launched = []
    monkeypatch.setattr(launcher, "launch", lambda kernel, grid, *args, **options: launched.append(grid))
    p = make_problem(seed=0, rows=5, n_in=70, widths=widths, loss=LOSSES[loss])
    monkeypatch.setenv(plan.ENVIRONMENT_VARIABLE, "fused")
    kernels.sngd_epoch_(p.weight, p.bias, p.x, p.target, None, 5, *flatten(p.suffix, p.activation), loss, torch.tensor(0.1))
    found = choose((70, *widths), 5, loss=loss, wanted="fused")
    assert found.launches == len(launched)


@pytest.mark.parametrize("by_gram", [False, True])
@pytest.mark.parametrize("rows", [tiling.NEXT_ROWS, tiling.NEXT_ROWS + 1])
@pytest.mark.parametrize(("widths", "loss"), [((784, 100, 10), 0), ((1100, 2000, 9), 1), ((30, 784), 1), ((1100, 2000), 0)])
def test_the_model_counts_the_streamed_plan_s_launches(widths, loss, rows, by_gram, monkeypatch):
    from support import LOSSES, make_problem

    from dante_kernels import kernels
    from dante_kernels.kernels import launcher
    from dante_kernels.ops.layer import flatten

    launched, mm = [], torch.mm
    monkeypatch.setattr(launcher, "launch", lambda kernel, grid, *args, **options: launched.append(kernel))
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out: launched.append(mm))
    monkeypatch.setattr(tiling, "by_gram", lambda *sizes: by_gram)
    monkeypatch.setenv(plan.ENVIRONMENT_VARIABLE, "streamed")
    n_in, *rest = widths
    p = make_problem(seed=0, rows=2 * rows, n_in=n_in, widths=tuple(rest), loss=LOSSES[loss])
    arguments = (p.weight, p.bias, p.x, p.target, None, rows, *flatten(p.suffix, p.activation), loss, torch.tensor(0.1))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            launched.clear()
            kernels.sngd_epoch_(*arguments)
            # The first mini-batch is gathered and multiplied before its step, the last one's step gathers no other.
            step = cost.streamed(Shape(widths, rows, loss, precision=precision), H200).launches
            assert len(launched) == 2 * step + 1
            assert (mm in launched) == (precision == "high" and 2000 in widths and (rows > tiling.NEXT_ROWS))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("batch", "serves"), [(20, True), (500, False)])
def test_the_model_s_norm_is_the_one_that_the_rule_takes(batch, serves, monkeypatch):
    shape = Shape((3072, 512, 10), batch)
    found = cost.streamed(shape, H200)
    for forced in (True, False):
        monkeypatch.setattr(tiling, "by_gram", lambda *sizes, forced=forced: forced)
        assert (cost.streamed(shape, H200) == found) == (forced == serves)


def test_small_layers_stay_on_chip_and_large_ones_do_not():
    assert choose((784, 100, 10), 20).plan == "persistent"
    assert choose((784, 100, 10), 20).limit == "barriers"
    assert choose((784, 400, 200, 10), 20).plan == "persistent"
    assert choose((784, 400, 200, 100, 10), 20).plan == "fused"
    assert choose((12288, 3072, 1536, 768, 384, 200), 20).plan == "streamed"
    assert choose((12288, 3072, 1536, 768, 384, 200), 500).plan == "fused"
    assert choose((12288, 3072, 1536, 768, 384, 200), 100, precision="high").limit in ("L2", "memory")


def test_large_tiles_are_for_one_capability_and_small_next_layers():
    large = Shape((3072, 512, 10), 20, momentum=True)
    how = plan.persistent(large, 132)
    assert (how.split_out, how.split_in, how.parts, how.num_warps) == (8, 12, 4, 8)
    assert choose(large.widths, 20, momentum=True).plan == "persistent"
    assert plan.persistent(large, 95) is None
    assert plan.persistent(large._replace(x_dtype=torch.bfloat16), 132) is None
    assert plan.persistent(large, 132, H200._replace(hopper=False)) is None
    assert plan.persistent(large._replace(widths=(3072, 512, 17)), 132) is None
    assert plan.persistent(large, 132, both=True) is None
    # The velocity comes and goes; two more tiles of rows are that much work and latency, and three barriers stay.
    free = H200._replace(l2=1e9, l2_per_multiprocessor=1e9)
    still = plan.persistent(large._replace(momentum=False), 132)
    assert how.drawn - still.drawn == pytest.approx(8 * 64 * 256 / 1e6)
    longer = plan.persistent(large._replace(batch=64), 132, free).microseconds - plan.persistent(large, 132, free).microseconds
    again = 4 * 2 * 3 * 32 * 256 / 1e6  # MB of X that three of the four parts read from L1
    beside = 256 * (4 * plan.TILE_PART + 16 / 256 * (4 * 256 * plan.TILE_X + 256 * plan.TILE_Z + 16 * plan.TILE_NEXT))
    issued = 16 * 2 * 64 * (256 + 16) + beside  # multiply-adds, and other instructions of each thread
    assert longer == pytest.approx(2 * (0.5 + issued / 1e6 / H200.fma) + again / H200.l1, rel=1e-3)
    # 112 rows find room in L1, but not beside the velocity.
    hundred, moving = (plan.persistent(large._replace(batch=100, momentum=m), 132) for m in (False, True))
    assert moving.drawn - hundred.drawn == pytest.approx((8 * 64 * 256 + 4 * 2 * 3 * 112 * 256) / 1e6)


def test_what_comes_from_l2_is_a_limit_for_many_programs_too():
    slow = H200._replace(l2=1.0)
    for batch, device, limit in ((20, H200, "arithmetic"), (20, slow, "L2"), (100, H200, "arithmetic"), (100, slow, "L2")):
        shape = Shape((3072, 512, 10), batch, momentum=True)
        assert plan.choose(shape, device, 132, "persistent").limit == limit


def test_programs_of_4_warps_are_two_on_a_multiprocessor_and_take_turns_there():
    how = plan.persistent(Shape((784, 100, 10), 20), 132)
    assert (how.programs, how.num_warps) == (49, 4)
    assert [how.at_once(most) for most in (24, 25, 49, 132)] == [0, 1, 2, 5]
    assert how._replace(num_warps=8).at_once(132) == 2
    endless = H200._replace(l2=1e9, l2_per_multiprocessor=1e9)
    two, three = (plan.side_by_side(how, models, 132, endless) for models in (2, 3))
    assert three - two == pytest.approx(how.busy, rel=1e-3)


def test_a_mini_batch_of_many_rows_is_one_tile_where_that_compiles():
    hundred = Shape((784, 100, 10), 100)
    assert plan.persistent(hundred, 132).rows == 128
    assert plan.persistent(hundred._replace(batch=50), 132, near=1.0).rows == 64
    for other in (
        hundred._replace(batch=129),
        hundred._replace(x_dtype=torch.bfloat16),
        hundred._replace(widths=(784, 100, 17)),
    ):
        assert plan.persistent(other, 132).rows <= 32


def test_tiles_for_matrix_units_are_for_tf32_whole_mini_batches_and_one_capability():
    def chosen(device: plan.Device = H200, both: bool = False, **demand) -> plan.Persistent:
        shape = Shape(**{"widths": (784, 100, 10), "batch": 20, "precision": "high"} | demand)
        return plan.persistent(shape, 132, device, both)

    for how in (
        chosen(), chosen(precision="medium"), chosen(batch=128), chosen(batch=100, x_dtype=torch.bfloat16), chosen(both=True),
    ):  # fmt: skip
        assert (how.precision, how.one_barrier) == ("tf32", False)
    assert chosen(batch=100).rows == 128
    for how in (
        chosen(precision="highest"), chosen(batch=129), chosen(widths=(784, 100, 17), batch=33),
        chosen(widths=(784, 100, 50, 10)), chosen(H200._replace(hopper=False)), chosen(both=True, batch=33),
    ):  # fmt: skip
        assert how.precision == "ieee"
    # The one with the fewest programs spills where x is widened.
    assert [chosen(x_dtype=dtype).programs for dtype in (torch.float32, torch.uint8)] == [28, 49]
    assert chosen(x_dtype=torch.uint8).microseconds < 0.9 * chosen(precision="highest").microseconds
    # Products take what they take on the matrix units, and all other instructions what they take elsewhere.
    products, instructions = 2 * 32 * 4 * 64 * 16 + 2 * 32 * 16 * 16, plan.STEP_MATRIX + plan.MATRIX_X * 64
    instructions += plan.MATRIX_UNIT * 16 + plan.MATRIX_ROW * 32
    assert chosen().busy == pytest.approx(products / 1e6 / H200.tf32 + 128 * instructions / 1e6 / H200.fma)


def test_a_plan_that_serves_but_is_slower_is_not_chosen(monkeypatch):
    slow = plan.persistent(Shape((784, 100, 10), 20), 132)._replace(microseconds=1e3)
    monkeypatch.setattr(plan, "persistent", lambda *args, **rest: slow)
    found = plan.choose.__wrapped__(Shape((784, 100, 10), 20), H200, 132)
    assert found.plan == "fused"
    assert found.tiles is None
    assert "persistent would take 1000.0 us" in found.why


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_room_for_more_models_is_not_worth_another_plan(precision):
    """Tiles that are near the fastest may be slower than another plan, which the fastest are not."""
    seen = 0
    nets = ((300, 400, 10), (784, 200, 10), (2000, 100, 10), (400, 10))
    for widths, batch, momentum in itertools.product(nets, (50, 100, 128), (False, True)):
        shape = Shape(widths, batch, momentum=momentum, precision=precision)
        found = plan.choose(shape, H200, 132)
        others = min(plan.choose(shape, H200, 132, name).microseconds for name in plan.SERVED if name != "persistent")
        near, fastest = (plan.persistent(shape, 132, near=near).microseconds for near in (plan.NEAR, 1.0))
        assert found.microseconds == (near if near <= others else min(fastest, others))
        seen += near > others > fastest
    assert seen


def test_every_choice_serves_what_is_asked():
    everything = itertools.product(
        ((784, 100, 10), (64, 10), (784, 400), (12288, 3072, 10), (50, 40, 30, 20), (70, 10, 100)),
        (1, 20, 64, 65, 500), losses.CODES.values(), (False, True), (torch.float32, torch.bfloat16), (1, 40, 132),
    )  # fmt: skip
    plans = set()
    for widths, batch, loss, momentum, x_dtype, most in everything:
        found = choose(widths, batch, loss=loss, momentum=momentum, x_dtype=x_dtype, most_programs=most)
        plans.add(found.plan)
        assert found.plan in plan.SERVED
        assert found.limit in cost.LIMITS
        assert found.microseconds > 0
        assert (found.tiles is not None) == (found.plan == "persistent") == (found.launches == 0)
        if found.tiles is not None:
            shape = Shape(widths, batch, loss, momentum=momentum, x_dtype=x_dtype)
            assert found.tiles == plan.persistent(shape, most)
    assert plans == set(plan.SERVED)


REASONS = [
    ((784, 400, 200, 100, 10), 20, {}, "3 layers after it > 2"),
    ((784, 400, 300, 10), 20, {}, "next layer's width 300 > 256"),
    ((784, 400, 200, 20), 20, {}, "last layer's width 20 > 16"),
    ((784, 100, 70), 20, {}, "next layer's width 70 > 64"),
    ((12288, 3072, 10), 20, {}, "W does not fit the registers of 132 programs"),
    ((784, 100, 10), 20, {"most_programs": 3}, "W does not fit the registers of 3 programs"),
    (
        (8000, 100, 20),
        20,
        {"momentum": True, "precision": "high"},
        "W and its velocity do not fit the registers of 132 programs",
    ),
    ((784, 1280, 10), 20, {"most_programs": 60}, "W does not fit the registers of 60 programs"),
    ((3072, 512, 17), 20, {}, "W does not fit the registers of 132 programs (large tiles, which would hold W, are for float32"),
    ((3072, 512, 10), 20, {"x_dtype": torch.bfloat16}, "W does not fit the registers of 132 programs (large tiles, which"),
    ((20, 100), 20, {"loss": losses.CROSS_ENTROPY}, "a softmax row must lie in one program: 100 > 64"),
    ((20, 100), 100, {"loss": losses.CROSS_ENTROPY, "precision": "high"}, "a softmax row must lie in one program: 100 > 64"),
    ((784, 400, 200, 10), 2**21, {}, "what its programs exchange of 2097152 rows is more than 2147483648 numbers"),
    ((20000, 100), 33, {"precision": "high"}, "W does not fit the registers of 132 programs"),
]


@pytest.mark.parametrize(("widths", "batch", "rest", "reason"), REASONS, ids=[r[-1] for r in REASONS])
def test_the_reason_names_what_stands_against_the_persistent_plan(widths, batch, rest, reason):
    found = choose(widths, batch, **rest)
    assert found.plan != "persistent"
    assert f"persistent does not serve: {reason}" in found.why
    with pytest.raises(ValueError, match="the persistent plan cannot serve this pass: .*" + re.escape(reason.split(" >")[0])):
        choose(widths, batch, wanted="persistent", **rest)


def test_whatever_is_not_served_has_a_reason():
    generator = random.Random(0)
    refused = 0
    for _ in range(1500):
        widths = tuple(generator.choice((1, 10, 17, 33, 65, 130, 260, 800, 8000)) for _ in range(generator.randint(2, 5)))
        rest = {
            "batch": generator.choice((1, 20, 32, 33, 500, 10**6)), "momentum": generator.random() < 0.5,
            "loss": generator.choice(list(losses.CODES.values())), "precision": generator.choice(("highest", "high", "medium")),
            "x_dtype": generator.choice((torch.float32, torch.bfloat16)),
        }  # fmt: skip
        found = choose(widths, **rest)
        if plan.persistent(Shape(widths, **rest), 132) is None:
            refused += 1
            assert "persistent does not serve: " in found.why
            assert re.search("persistent does not serve: [a-zW0-9]", found.why), (widths, rest)
    assert 100 < refused < 1400


def test_models_side_by_side_share_l2_and_what_has_no_room_waits():
    how = plan.persistent(Shape((784, 100, 64), 20, precision="high"), 132)
    alone, ten = (plan.side_by_side(how, models, 132) for models in (1, 10))
    assert alone == pytest.approx(how.microseconds)
    shared = 10 * how.split_in * how.drawn / H200.l2 - how.drawn / H200.l2_per_multiprocessor
    assert ten == pytest.approx(alone + shared)
    assert shared > 0
    assert plan.side_by_side(how, 11, 132) == pytest.approx(ten + alone)
    assert plan.side_by_side(how, 10, 132, H200._replace(l2=1e9)) == pytest.approx(alone)


def test_what_is_wanted_is_taken_and_what_is_unknown_refused():
    for wanted in plan.SERVED:
        found = choose((784, 100, 10), 20, wanted=wanted)
        assert (found.plan, found.why) == (wanted, "DANTE_GPU_PLAN names it")
    with pytest.raises(
        ValueError, match="DANTE_GPU_PLAN: expected one of auto, persistent, streamed, fused, library, got 'fast'"
    ):
        choose((784, 100, 10), 20, wanted="fast")


def test_a_faster_way_that_is_no_plan_is_named():
    assert "by torch alone would take" in choose((2, 50000, 5, 50), 1, precision="high", x_dtype=torch.uint8).why
    assert "built in" not in choose((784, 100, 10), 20).why


def test_the_tables_in_the_docs_are_what_the_model_says():
    spec = importlib.util.spec_from_file_location("plan_table", ROOT / "bench" / "plan_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "docs" / "plans.md").read_text()
    for table in (script.lines(), script.aims(), script.models()):
        assert "\n".join(table) in text, "run python bench/plan_table.py"


def test_blocks_are_one_launch_while_that_is_faster_than_python_and_the_device_block_by_block():
    def longest(batch: int, device: plan.Device = H200, **rest) -> int:
        shape = Shape((784, 100, 10), batch, **rest)
        chosen = [plan.blocks(shape, steps, 132, device) is not None for steps in range(1, 2000)]
        assert chosen == sorted(chosen, reverse=True)  # short blocks, and no long ones
        return sum(chosen)

    text = " ".join((ROOT / "docs" / "plans.md").read_text().split())
    assert f"up to {longest(20)} steps a block at batch 20, and {longest(100)} at batch 100" in text
    high = [longest(20, precision="high", x_dtype=x_dtype) for x_dtype in (torch.float32, torch.uint8)]
    assert f"(`highest`; under `high` {high[0]} at batch 20, {high[1]} of uint8 x)" in text
    assert longest(20, precision="high", momentum=True) == high[0]
    assert [longest(batch, momentum=True) for batch in (20, 100)] == [longest(20), longest(100)]
    assert f"less than {plan.SHARED} times as long" in text
    assert longest(20, H200._replace(in_and_out=0.0)) < longest(20) < longest(20, H200._replace(in_and_out=440.0))
    for wanted in ("auto", "persistent"):
        assert plan.blocks(Shape((784, 100, 100, 10), 20), 20, 132, H200, wanted) is None
    assert plan.blocks(Shape((784, 100, 10), 20), 2000, 132, H200, "persistent") is not None


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_round_in_one_launch_is_held_against_the_plan_that_blocks_would_have(precision):
    whole = set()
    for batch, n_out, steps in itertools.product((20, 100, 128, 129, 200, 500), (100, 400), (1, 3, 20)):
        shape = Shape((784, n_out, 10), batch, precision=precision)
        both, last = plan.persistent(shape, 132, both=True), shape._replace(widths=(n_out, 10))
        of_steps = steps * sum(plan.choose(one, H200, 132).microseconds for one in (shape, last))
        alone = of_steps + 2 * cost.block(shape, steps, H200)
        fast = both is not None and 2 * steps * both.microseconds < plan.SHARED * alone
        assert (plan.blocks(shape, steps, 132) is not None) == fast
        whole |= {fast}
    assert whole == {False, True}
    # The persistent plan's own blocks would take longer still, and they are not what would run.
    assert plan.blocks(Shape((784, 100, 10), 200, precision=precision), 3, 132) is None


def test_blocks_of_deeper_nets_take_what_the_docs_say():
    def beside(*widths: int, steps: int) -> float:
        return cost.block(Shape(widths, 20, momentum=True), steps, H200)

    def block(*widths: int, precision: str = "highest") -> float:
        shapes = [Shape(widths[i:], 20, momentum=True, precision=precision) for i in range(len(widths) - 1)]
        times = [plan.choose(shape, H200, 132).microseconds for shape in shapes]
        return 20 * sum(times) / len(times) + cost.block(shapes[0], 20, H200)

    text = " ".join((ROOT / "docs" / "plans.md").read_text().split())
    three, four = (784, 100, 100, 10), (784, 400, 200, 10)
    assert f"take {block(*three) / 20:.1f} and {block(*four) / 20:.1f} us, with all that a block" in text
    for steps in (3, 20):
        range_ = f"{beside(*three, steps=steps):.0f} to {beside(784, 400, 200, 100, 10, steps=steps):.0f} us"
        assert f"{range_} a block of {steps} steps" in text
    shortest, longest = block(*three, precision="high"), block(784, 400, 200, 100, 10)
    small = sorted({round(block(784, 100, 10, precision=precision)) for precision in ("high", "highest")})
    assert f"{shortest:.0f} to {longest:.0f} us a block of 20, steps included, for the deeper of these nets" in text
    assert f"and {' to '.join(map(str, small))} us for 784-100-10" in text
