"""Print what the GPU plans take by the cost model, as the tables of docs/plans.md: nothing in them is measured.

python bench/plan_table.py
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from dante_kernels.kernels import cost, plan

NETS = [
    (784, 100, 10), (784, 400, 200, 10), (3072, 512, 10), (3072, 1024, 512, 256, 128, 64, 10),
    (12288, 3072, 1536, 768, 384, 200),
]  # fmt: skip
BATCHES = (20, 100, 500)


def lines() -> list[str]:
    """The table: first layer active, on an H200; microseconds of a step at the precisions highest and high."""
    table = [
        "| net, first layer active | batch | precision | persistent | fused | streamed | library | plain | chosen | limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for widths in NETS:
        for batch in BATCHES:
            for precision in ("highest", "high"):
                shape = plan.Shape(widths, batch, precision=precision)
                found = plan.choose(shape, plan.H200, plan.H200.multiprocessors)
                kept = "-"
                if plan.persistent(shape, plan.H200.multiprocessors):
                    kept = f"{plan.choose(shape, plan.H200, plan.H200.multiprocessors, 'persistent').microseconds:.1f}"
                others = (cost.fused, cost.streamed, cost.library, cost.plain)
                times = [f"{model(shape, plan.H200).microseconds:.1f}" for model in others]
                cells = ["-".join(map(str, widths)), str(batch), precision, kept, *times, found.plan, found.limit]
                table.append(f"| {' | '.join(cells)} |")
    return table


# What is aimed at: so many times a plain step by a library, at the batch sizes above.
AIMS = {NETS[0]: (5, 5, 5), NETS[1]: (3, 3, 3), NETS[2]: (3, 3, 1.5), NETS[4]: (1.3, 1.3, 1.3)}


def aims() -> list[str]:
    """The table of what is aimed at, and what the model says: a plain step's time over that of the chosen plan."""
    table = [
        "| net, first layer active | batch | aim | highest | high |",
        "| --- | --- | --- | --- | --- |",
    ]
    for widths, wanted in AIMS.items():
        for batch, aim in zip(BATCHES, wanted, strict=True):
            cells = ["-".join(map(str, widths)), str(batch), f"{aim:g}"]
            for precision in ("highest", "high"):
                shape = plan.Shape(widths, batch, precision=precision)
                chosen = plan.choose(shape, plan.H200, plan.H200.multiprocessors)
                ratio = cost.plain(shape, plan.H200).microseconds / chosen.microseconds
                cells.append(f"{ratio:.1f}" if ratio >= aim else f"**{ratio:.1f}**")
            table.append(f"| {' | '.join(cells)} |")
    return table


MODELS = 32


def models() -> list[str]:
    """The table of MODELS models of 784-100-10 side by side, batch 20: what they gain over one alone in its fastest tiles."""
    table = [
        f"| precision | momentum | programs of a model | models in a launch | us a step of {MODELS} | times one alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    most = plan.H200.multiprocessors
    passes = itertools.product(("highest", "high", "medium"), (False, True), (False,))
    for precision, momentum, both in (*passes, ("highest", True, True), ("high", True, True)):
        shape = plan.Shape((784, 100, 10), 20, momentum=momentum, precision=precision)
        how, fastest = (plan.persistent(shape, most, both=both, near=near) for near in (plan.NEAR, 1.0))
        took = plan.side_by_side(how, MODELS, most)
        gain = MODELS * fastest.microseconds / took
        name = precision + ", rounds of blocks" * both
        cells = (name, "yes" if momentum else "no", how.programs, how.at_once(most), f"{took:.1f}", f"{gain:.1f}")
        table.append(f"| {' | '.join(map(str, cells))} |")
    return table


if __name__ == "__main__":
    print("\n".join([*lines(), "", *aims(), "", *models()]))
