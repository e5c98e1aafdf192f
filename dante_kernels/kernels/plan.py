"""Which plan a pass gets, by a cost model: from the shape, the mini-batch's size, the precision and the device.

`choose` decides. The model of the plans of several launches a step is in `cost.py`, that of the persistent plan is here,
with its tiles; the tiles of the fused step, which no mini-batch's size may change, are in `tiling.py`.
"""

from __future__ import annotations

import bisect
import functools
import os
from typing import Any, NamedTuple

import torch

from .. import losses
from . import cost, tiling
from .cost import H200, Cost, Device, Shape
from .tiling import power_of_two

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "H200",
    "SERVED",
    "Choice",
    "Device",
    "Persistent",
    "Shape",
    "blocks",
    "choose",
    "device_of",
    "persistent",
    "side_by_side",
    "wanted_plan",
]


class Persistent(NamedTuple):
    """The tiles of a pass in one launch (`persistent.py`), and the modelled microseconds of a step."""

    rows: int
    units: int
    inputs: int
    next_units: int  # of each slice, where another layer follows it
    last_units: int
    split_out: int
    split_in: int
    slices: int  # of the inputs of a program
    parts: int  # of the units of a program, more than one where its tile is too large to be updated at once
    num_warps: int
    precision: str
    one_barrier: bool  # with the Gram norm
    drawn: float  # MB that a program reads and writes in a step
    busy: float  # microseconds of a step for which a program's instructions, and its reads of L1, keep a multiprocessor
    microseconds: float

    @property
    def programs(self) -> int:
        """How many programs a model has."""
        return self.split_out * self.split_in

    def at_once(self, multiprocessors: int) -> int:
        """How many models find room on so many multiprocessors, each of which has registers for `WARPS` warps."""
        return multiprocessors * (WARPS // self.num_warps) // self.programs

    def scratch(self, batch: int) -> int:
        """Numbers in the larger of a model's exchange buffers, at most."""
        padded = -(-batch // self.rows) * self.rows
        return padded * max((self.split_in + 1) * self.units, (self.split_out + 1) * self.slices * self.next_units)


# Warps of 255 registers a thread for which a multiprocessor has room, and threads of a warp.
WARPS, LANES = 8, 32

# The form with one barrier: its most rows and units, and the inputs of a program, without momentum and with it. Found by
# compiling: with more, with three tf32 products, for another capability than 9.0, or with less than 64 units before another
# layer some specialization spills.
ONE_BARRIER_ROWS, ONE_BARRIER_UNITS, ONE_BARRIER_INPUTS = 32, 128, (64, 32)


class Sizes(NamedTuple):
    """A program's tile: rows at a time, units, inputs of a slice, slices, warps, and parts of the units."""

    rows: int
    units: int
    inputs: int
    slices: int
    warps: int
    parts: int = 1


# All tiles were found by compiling: with larger ones some specialization spills. First those of one layer and at most one after
# it, and where both of them are trained in turn.
SHORT = tuple(Sizes(32, *tile, warps, warps) for warps in (4, 8) for tile in ((16, 16), (16, 32), (32, 16)))
BOTH = (Sizes(16, 16, 16, 4, 4), Sizes(16, 16, 32, 4, 4), Sizes(32, 16, 32, 4, 8), Sizes(32, 32, 32, 4, 8))

# For float32 and uint8 x, at most so many units of the next layer, and only where they are the whole mini-batch's rows.
# Widened bfloat16 in a dot of 64 rows would be rounded to tf32 (`tiling._largest`).
TALL = tuple(Sizes(64, *tile, 4, 8) for tile in ((16, 16), (16, 32), (32, 16), (32, 32)))
TALL += tuple(Sizes(128, *tile, 4, 8) for tile in ((16, 16), (16, 32), (32, 16)))
TALL_NEXT = 16

# Likewise, but for mini-batches of any size, and for capability 9.0 alone.
LARGE = (Sizes(16, 64, 64, 4, 8, 4),)

# For matrix units, where tf32 products are allowed, for capability 9.0 alone: only for mini-batches that are one tile, and at
# most TALL_NEXT units of the next layer, but for any x; then those that spill but for float32 x, and those of rounds.
MATRIX = tuple(Sizes(32, *tile) for tile in ((16, 16, 4, 4), (16, 32, 4, 4), (32, 16, 4, 4), (16, 32, 8, 8), (32, 16, 8, 8)))
MATRIX += tuple(Sizes(64, *tile) for tile in ((16, 16, 4, 4), (16, 32, 4, 8), (32, 16, 4, 8)))
MATRIX += tuple(Sizes(128, 16, 16, slices, 8) for slices in (4, 8))
MATRIX_WIDE = (Sizes(32, 16, 64, 4, 4), Sizes(64, 16, 32, 8, 8))
MATRIX_BOTH = tuple(Sizes(32, 16, *tile) for tile in ((32, 4, 4), (16, 8, 8), (32, 8, 8)))

# With two layers after the active one, and the most units of both.
DEEP, DEEP_WIDTHS = (Sizes(16, 16, 32, 4, 8), Sizes(16, 32, 32, 4, 8)), (256, 16)

# Instructions of a warp in a step beside its multiply-adds, as compiled for capability 9.0 with leaky ReLU and squares (tanh or
# softmax has up to twice as many): where a mini-batch is one tile of rows, where it is several, where two layers follow; for
# each tile those of each part of the units, of each number of X that a thread has, of each of Z before the slices' sum, and of
# each of the next layer's; and how many times as many there are where both layers are trained.
STEP, STEP_TILES, STEP_DEEP, TILE_PART, TILE_X, TILE_Z, TILE_NEXT, BESIDE_BOTH = 630, 950, 1750, 70, 12, 8, 70, 1.35

# Likewise on matrix units: of a step, of each number of X that a thread has, of each unit and of each row; and how many times
# as many there are where no layer follows.
STEP_MATRIX, MATRIX_X, MATRIX_UNIT, MATRIX_ROW, MATRIX_LAST = 110, 14, 43, 7, 0.7

# Likewise with one barrier: of a step, and of each number that a thread adds up.
STEP_GRAM, GRAM_SUM = 1700, 1.55

# Places in a launch's scratch are int32.
MOST_SCRATCH = 2**31

# A modelled time within this factor of the best is as good: the model is no better than that.
NEAR = 1.2

# So many times what replayed blocks take alone a round in one launch may take, since there several models share the launch; and
# whether it does must not depend on how many there are.
SHARED = 1.2


def _shared(how: Persistent, programs: int, multiprocessors: int, device: Device) -> float:
    """Microseconds of a step for which so many programs keep the busiest multiprocessor, or L2: if it does them in turn."""
    each = -(-programs // multiprocessors)
    return each * how.busy + max(each * how.drawn / device.l2_per_multiprocessor, programs * how.drawn / device.l2)


def side_by_side(how: Persistent, models: int, most_programs: int, device: Device = H200) -> float:
    """Microseconds of a step of so many models, in as few launches, one after the other, as there is room for."""
    at_once = how.at_once(most_programs)
    launches = [at_once] * (models // at_once) + [models % at_once] * (models % at_once > 0)
    alone = how.microseconds - _shared(how, how.programs, most_programs, device)
    return sum(alone + _shared(how, together * how.programs, most_programs, device) for together in launches)


def _persistent(
    widths: tuple[int, ...], batch: int, sizes: Sizes, device: Device, momentum: bool = False, both: bool = False,
    precision: str = "ieee",
) -> Persistent:  # fmt: skip
    rows, units, inputs, slices, warps, parts = sizes
    n_in, n_out, *suffix = widths
    split_out, split_in = -(-n_out // units), -(-n_in // (slices * inputs))
    n_next, deep = suffix[0] if suffix else 0, len(suffix) == 2
    next_units = power_of_two(-(-n_next // slices) if deep else n_next, 16, 64) if suffix else 16
    last_units = power_of_two(suffix[-1], 16, 64) if deep else 16
    tiles = -(-batch // rows)
    padded, programs = tiles * rows, split_out * split_in
    again, in_l1 = 0, True
    threads = LANES * warps
    numbers = TILE_X * parts * slices * inputs + TILE_Z * slices * units + TILE_NEXT * next_units * (len(suffix) == 1)
    instructions = tiles * (TILE_PART * parts + numbers * rows / threads)
    products = 2 * padded * slices * inputs * units
    products += (2 + both) * padded * units * next_units if n_next and not deep else 0
    if deep:
        # Of so many rows a program adds up Z, and goes to the next layer, through the last one and back.
        own, wide = -(-tiles // split_in) * rows, slices * next_units
        products += 2 * own * wide * (units + last_units)
        instructions += STEP_DEEP
        barriers = 2 * (split_in > 1) + 3 * (programs > 1)
        pieces = -(-padded * wide // (tiling.PIECE * programs)) * tiling.PIECE
        exchanged = (2 * slices * inputs + 2 * units) * padded + own * ((split_in + 3) * units + 2 * wide)
        exchanged += (split_out + 1) * pieces
    elif tiles == 1 and parts == 1:
        instructions += STEP
        if precision != "ieee":
            instructions = STEP_MATRIX + MATRIX_X * slices * inputs * rows / threads + MATRIX_UNIT * units + MATRIX_ROW * rows
            instructions *= 1 if suffix else MATRIX_LAST
        barriers = (split_in > 1) + (n_next > 0 and split_out > 1) + (programs > 1)
        exchanged = (slices * inputs + (split_in > 1) * split_in * units + (split_out > 1) * split_out * n_next) * batch
    else:
        instructions += STEP_TILES
        barriers = (split_in > 1) + 2 * (programs > 1)
        exchanged = (2 * slices * inputs + 4 * units + split_out * n_next) * padded
        # Of several parts of the units all but the first read X again, from L1 if it finds room there beside the velocity.
        kept = slices * inputs * units * (momentum and parts > 1)
        again = 2 * (parts - 1) * slices * inputs * padded
        in_l1 = 4 * (slices * inputs * padded + kept) <= device.l1_bytes
        exchanged += 2 * kept + (0 if in_l1 else again)
    latency = barriers * (device.barrier + device.barrier_program * programs) + (tiles - 1) * device.tile
    busy = products / 1e6 / (device.fma if precision == "ieee" else device.rate(precision))
    busy += threads * instructions * (BESIDE_BOTH if both else 1) / 1e6 / device.fma + 4 * again * in_l1 / 1e6 / device.l1
    drawn = 4 * exchanged / 1e6
    split = split_out, split_in, slices, parts, warps
    how = Persistent(rows, units, inputs, next_units, last_units, *split, precision, False, drawn, busy, 0.0)
    return how._replace(microseconds=latency + _shared(how, programs, device.multiprocessors, device))


def _one_barrier(
    n_out: int, n_in: int, n_next: int, batch: int, inputs: int, precision: str, device: Device, rows: int = 32
) -> Persistent:
    """The form with the Gram norm: every program has all units of some inputs, in a tile for the matrix units."""
    split_in, units = -(-n_in // inputs), power_of_two(n_out, 64 if n_next else 16, 128)
    next_units = power_of_two(n_next, 16, 64) if n_next else 16
    products = rows * (2 * inputs * units + rows * (inputs + units) + (2 * units * next_units if n_next else 0))
    threads = LANES * WARPS
    instructions = STEP_GRAM + GRAM_SUM * split_in * rows * (units + rows) / threads
    exchanged = batch * inputs + split_in * batch * (-(-n_out // 16) * 16 + rows)
    busy = products / 1e6 / device.rate(precision) + threads * instructions / 1e6 / device.fma
    drawn = 4 * exchanged / 1e6
    how = Persistent(rows, units, inputs, next_units, 16, 1, split_in, 1, 1, WARPS, precision, True, drawn, busy, 0.0)
    latency = device.barrier + device.barrier_program * split_in
    return how._replace(microseconds=latency + _shared(how, split_in, device.multiprocessors, device))


def _may_use_tf32(shape: Shape, device: Device) -> bool:
    return device.hopper and shape.precision != "highest"


def _sizes(shape: Shape, device: Device, both: bool) -> list[tuple[Sizes, str]]:
    """The tiles that a pass, or with `both` a round, may have, and the arithmetic of their products."""
    n_next, x_dtype = (*shape.widths[2:], 0)[0], shape.x_dtype
    plain, matrix = (BOTH, MATRIX_BOTH) if both else (SHORT, MATRIX)
    if len(shape.widths) == 4:
        plain, matrix = DEEP, ()
    elif n_next > TALL_NEXT:
        matrix = ()
    elif not both:
        if x_dtype != torch.bfloat16:
            plain += tuple(tile for tile in TALL if shape.batch <= tile.rows) + LARGE * device.hopper
        if x_dtype == torch.float32:
            matrix += MATRIX_WIDE
    if not _may_use_tf32(shape, device):
        matrix = ()
    return [(tile, "ieee") for tile in plain] + [(tile, "tf32") for tile in matrix if shape.batch <= tile.rows]


def persistent(
    shape: Shape, most_programs: int, device: Device = H200, both: bool = False, near: float = NEAR
) -> Persistent | None:
    """The tiles of the persistent plan: of those near the fastest, by the model, those of which the most find room at once.

    So that several models run side by side, with the tiles, and the bits, of each alone. None where the plan does not serve.

    It serves the last three layers, where the layer fits the registers of at most `most_programs` programs.
    Its arithmetic is plain float32; where tf32 products are allowed, there are tiles for the matrix units, too, and the form
    with one barrier a step, which has the switch's precision. Times up to `near` times the fastest count as equal. `both` says
    that the last layer is trained too, in turn with the one before it.
    """
    n_in, n_out, *suffix = shape.widths
    n_next, batch = suffix[0] if suffix else 0, shape.batch
    if len(suffix) > 2 or (len(suffix) < 2 and n_next > (16 if both else 64)):
        return None
    if len(suffix) == 2 and (n_next > DEEP_WIDTHS[0] or suffix[1] > DEEP_WIDTHS[1]):
        return None
    sized = (
        _persistent(shape.widths, batch, sizes, device, shape.momentum, both, precision)
        for sizes, precision in _sizes(shape, device, both)
    )
    fitting = [
        tiles
        for tiles in sized
        if tiles.programs <= most_programs
        and tiles.scratch(batch) < MOST_SCRATCH
        and not (shape.loss == losses.CROSS_ENTROPY and not suffix and tiles.split_out > 1)
    ]
    fits = len(suffix) < 2 and batch <= ONE_BARRIER_ROWS and n_out <= ONE_BARRIER_UNITS
    if _may_use_tf32(shape, device) and not both and fits:
        inputs = ONE_BARRIER_INPUTS[shape.momentum or shape.x_dtype == torch.bfloat16]
        tiles = _one_barrier(n_out, n_in, n_next, batch, inputs, "tf32" if shape.precision == "high" else "bf16", device)
        if 1 < tiles.split_in <= most_programs:
            fitting.append(tiles)
    longest = near * min((tiles.microseconds for tiles in fitting), default=0.0)
    good = (tiles for tiles in fitting if tiles.microseconds <= longest)
    return max(good, key=lambda t: (t.at_once(most_programs), -t.microseconds, t.num_warps), default=None)


@functools.lru_cache(maxsize=1024)
def blocks(shape: Shape, steps: float, most_programs: int, device: Device = H200, wanted: str = "auto") -> Persistent | None:
    """The tiles with which blocks of `steps` steps, of two layers, run in one launch; None where that is far slower.

    `shape` is that of a pass of the first layer; the second one's input is float32 whatever x is. With `wanted` "persistent"
    they run so wherever they can.

    There a step of either layer takes what the hidden one's takes, but a block costs the device nothing beside its steps. Else
    its launches are recorded and replayed, and its rows, its prefix's activations and its layer come and go.
    """
    if len(shape.widths) != 3:
        return None
    both = persistent(shape, most_programs, device, both=True)
    if both is None or wanted == "persistent":
        return both
    last = shape._replace(widths=shape.widths[1:], x_dtype=torch.float32)
    alone = sum(choose(one, device, most_programs).microseconds for one in (shape, last))
    in_turn = steps * alone + 2 * cost.block(shape, steps, device)
    return both if 2 * steps * both.microseconds < SHARED * in_turn else None


# The plans that a pass may be given; `kernels.sngd_epochs_` runs them.
SERVED = ("persistent", "streamed", "fused", "library")

# It names one of them, or auto.
ENVIRONMENT_VARIABLE = "DANTE_GPU_PLAN"


def wanted_plan() -> str:
    """What the environment variable names; auto where it is unset or empty."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


# More programs than any device has: the layer's size then decides nothing.
_PLENTY = 2**30


class Choice(NamedTuple):
    """The plan of a pass, the persistent plan's tiles, what a step takes by the model, and why this plan and no other."""

    plan: str
    tiles: Persistent | None
    microseconds: float
    limit: str
    launches: int  # of a step; none where the whole pass is one
    why: str


def device_of(device: torch.device) -> Device:
    """What the model knows of a device: an H200's numbers, with a CUDA device's own multiprocessors, size of L2, capability."""
    if device.type != "cuda":
        return H200
    found = torch.cuda.get_device_properties(device)
    hopper = (found.major, found.minor) == (9, 0)
    return H200._replace(multiprocessors=found.multi_processor_count, l2_bytes=found.L2_cache_size, hopper=hopper)


def _persistent_cost(tiles: Persistent, shape: Shape, most_programs: int, device: Device) -> Cost:
    """The persistent plan's cost; its limit is what would save the most if it took no time."""
    free = {
        "barriers": device._replace(barrier=0.0, barrier_program=0.0),
        "arithmetic": device._replace(fma=float("inf"), tf32=float("inf"), bf16=float("inf")),
        "L2": device._replace(l2_per_multiprocessor=float("inf"), l2=float("inf"), l1=float("inf")),
    }
    without = {limit: persistent(shape, most_programs, better) or tiles for limit, better in free.items()}
    return Cost(tiles.microseconds, min(without, key=lambda limit: without[limit].microseconds), 0)


def _refusal(shape: Shape, most_programs: int, device: Device) -> str:
    """Why the persistent plan does not serve: each demand of the shape put to it alone, the others made as easy as can be."""
    n_in, n_out, *suffix = shape.widths
    few = shape._replace(batch=min(shape.batch, ONE_BARRIER_ROWS + 1))  # more rows only take more scratch
    if persistent(few, most_programs, device) is not None:
        return f"what its programs exchange of {shape.batch} rows is more than {MOST_SCRATCH} numbers"
    easy = few._replace(widths=(1, 1, *[1] * min(len(suffix), 2)), loss=losses.MSE, momentum=False)

    def serves(most_programs: int = _PLENTY, **demand: Any) -> bool:
        return persistent(easy._replace(**demand), most_programs, device) is not None

    reasons = []
    if not serves(widths=(1, 1, *[1] * len(suffix))):
        most = bisect.bisect(range(len(suffix)), 0, key=lambda depth: not serves(widths=(1, 1, *[1] * depth))) - 1
        reasons.append(f"{len(suffix)} layers after it > {most}")
    for place, which in enumerate({1: ("next",), 2: ("next", "last")}.get(len(suffix), ())):

        def alone(width: int, place: int = place) -> bool:
            return serves(widths=(1, 1, *[width if i == place else 1 for i in range(len(suffix))]))

        if not alone(suffix[place]):
            most = bisect.bisect(range(1, suffix[place]), 0, key=lambda width: not alone(width))
            reasons.append(f"{which} layer's width {suffix[place]} > {most}")
    whole = (n_in, n_out, *(easy.widths[2:] if reasons else suffix))
    if not serves(most_programs, widths=whole, momentum=shape.momentum):
        kept = "W and its velocity do" if serves(most_programs, widths=whole) else "W does"
        reasons.append(f"{kept} not fit the registers of {most_programs} program{'s' * (most_programs != 1)}")
        large = easy._replace(widths=(n_in, n_out), x_dtype=torch.float32)
        if persistent(large, most_programs, device._replace(hopper=True)) is not None:
            reasons[-1] += (
                " (large tiles, which would hold W, are for float32 or uint8 x, for capability 9.0, "
                f"and before at most one layer, of {TALL_NEXT} units)"
            )
    elif not suffix and not serves(most_programs, widths=whole, momentum=shape.momentum, loss=shape.loss):
        most = bisect.bisect(
            range(1, n_out), 0, key=lambda units: not serves(widths=(n_in, units), momentum=shape.momentum, loss=shape.loss)
        )
        reasons.append(f"a softmax row must lie in one program: {n_out} > {most}")
    return ", ".join(reasons)


@functools.lru_cache(maxsize=1024)
def choose(shape: Shape, device: Device, most_programs: int, wanted: str = "auto") -> Choice:
    """The plan of a pass: the fastest by the model of those that serve it, or the one that is wanted.

    Args:
        shape: the pass.
        device: the GPU's numbers.
        most_programs: how many programs of a persistent kernel are sure to be on the device at once.
        wanted: ``"auto"``, or one of `SERVED`.

    The number of steps decides nothing: a pass gets the plan that its single steps get. Nor does it matter whether CUDA
    graphs are switched off; the model counts launches as replayed ones.

    Raises:
        ValueError: for another name, or a plan that cannot serve the pass.
    """
    if wanted not in ("auto", *SERVED):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected one of auto, {', '.join(SERVED)}, got {wanted!r}")
    of_launches = {"streamed": cost.streamed, "fused": cost.fused, "library": cost.library}
    costs = {name: model(shape, device) for name, model in of_launches.items()}
    tiles = persistent(shape, most_programs, device)
    fastest_other = min(of_plan.microseconds for of_plan in costs.values())
    if tiles is not None and tiles.microseconds > fastest_other:
        tiles = persistent(shape, most_programs, device, near=1.0)  # room for more models is not worth another plan
    if tiles is not None:
        costs["persistent"] = _persistent_cost(tiles, shape, most_programs, device)
    elif wanted == "persistent":
        refusal = _refusal(shape, most_programs, device)
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: the persistent plan cannot serve this pass: {refusal}")
    name = wanted
    if wanted == "auto":
        name = min((name for name in SERVED if name in costs), key=lambda name: costs[name].microseconds)
    why = f"{ENVIRONMENT_VARIABLE} names it" if wanted != "auto" else _why(name, costs, shape, device, most_programs)
    return Choice(name, tiles if name == "persistent" else None, *costs[name], why)


def _why(name: str, costs: dict[str, Cost], shape: Shape, device: Device, most_programs: int) -> str:
    """One sentence: what the other plans would take, or why they cannot serve."""
    others = [f"{other} would take {costs[other].microseconds:.1f} us" for other in SERVED if other in costs and other != name]
    if "persistent" not in costs:
        others.append(f"persistent does not serve: {_refusal(shape, most_programs, device)}")
    plain = cost.plain(shape, device).microseconds
    if plain < costs[name].microseconds:
        others.append(f"the same by torch alone would take {plain:.1f} us, but no such plan is built in")
    return f"{costs[name].microseconds:.1f} us by the model; " + "; ".join(others)
