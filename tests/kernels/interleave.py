"""Run a Triton kernel whose programs wait for each other, on the CPU: every program in a greenlet, interleaved unfairly.

The interpreter runs a grid's programs one after the other, so a grid barrier would wait for ever. Here each atomic
operation first gives way to another program, chosen by a seeded schedule: some programs are starved for a while, others
run in bursts, so that whoever does not wait where it must is seen to read what is not there yet.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import greenlet
import pytest
import triton.language as tl  # noqa: F401 - the interpreter looks for it among a kernel's globals
from triton.runtime import interpreter

TURNS = 2_000_000  # a schedule that has not ended by then never will


class Schedule:
    """Which of the programs that have not ended runs next, and for how many atomic operations."""

    def __init__(self, seed: int, fair: bool = False) -> None:
        self.random, self.fair, self.starved = random.Random(seed), fair, {}

    def next(self, alive: list[int]) -> tuple[int, int]:
        if self.fair:
            return alive[0], 1
        if not self.starved and len(alive) > 1 and self.random.random() < 0.3:
            some = self.random.sample(alive, self.random.randint(1, len(alive) - 1))
            self.starved = dict.fromkeys(some, self.random.randint(1, 16))
        ready = [program for program in alive if program not in self.starved] or alive
        self.starved = {program: turns - 1 for program, turns in self.starved.items() if turns > 1 and program in alive}
        return self.random.choice(ready), self.random.randint(1, 5)


class Deadlock(AssertionError):
    """No schedule brings this grid to its end."""


def run_grid(run_program: Callable[[int], None], programs: int, schedule: Schedule, give_way: list) -> None:
    """Run all programs, each until its next atomic operation, in the schedule's order."""
    builder = interpreter.interpreter_builder
    main = greenlet.getcurrent()
    threads = [greenlet.greenlet(lambda program=program: run_program(program)) for program in range(programs)]
    alive = list(range(programs))
    give_way.append(lambda: main.switch())
    try:
        for _ in range(TURNS):
            if not alive:
                return
            program, burst = schedule.next(alive)
            for _ in range(burst):
                builder.set_grid_idx(program, 0, 0)
                threads[program].switch()
                if threads[program].dead:
                    alive.remove(program)
                    break
            if schedule.fair and program in alive:
                alive.append(alive.pop(0))
        raise Deadlock(f"programs {alive} of {programs} never end")
    finally:
        give_way.pop()
        for thread in threads:
            if not thread.dead:
                thread.throw(greenlet.GreenletExit)


@contextmanager
def interleaved(seed: int, fair: bool = False) -> Iterator[list[int]]:
    """Within this, interpreted launches with a 1D grid of several programs run interleaved; yields their grid sizes."""
    builder, give_way, grids = interpreter.interpreter_builder, [], []
    patch = pytest.MonkeyPatch()
    original = type(builder).create_atomic_rmw

    def create_atomic_rmw(self, *args: Any) -> Any:
        if give_way:
            give_way[-1]()
        return original(self, *args)

    def call(self, *args_dev: Any, **kwargs: Any) -> None:
        if len(self.grid) > 1 or self.grid == (1,):
            return original_call(self, *args_dev, **kwargs)
        programs, function = self.grid[0], self.fn
        grids.append(programs)

        def everyone(**arguments: Any) -> None:
            builder.set_grid_dim(programs, 1, 1)
            run_grid(lambda program: function(**arguments), programs, Schedule(seed, fair), give_way)

        everyone.__signature__ = inspect.signature(function)
        self.fn, self.grid = everyone, (1,)
        return original_call(self, *args_dev, **kwargs)

    original_call = interpreter.GridExecutor.__call__
    patch.setattr(type(builder), "create_atomic_rmw", create_atomic_rmw)
    patch.setattr(interpreter.GridExecutor, "__call__", call)
    try:
        yield grids
    finally:
        patch.undo()
