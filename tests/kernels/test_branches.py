"""Work side by side on streams: what waits for what, on devices that only note it."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dante_kernels import kernels
from dante_kernels.kernels import branches


class Stream:
    """Notes what it is given: work, and waits for all that another stream has been given so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.given: list[tuple[str, object]] = []

    def wait_stream(self, other: Stream) -> None:
        self.given.append(("wait", (other, len(other.given))))

    def before(self) -> set[str]:
        """All work that is done before what this stream is given next."""
        return _done(self, len(self.given))


def _done(stream: Stream, upto: int) -> set[str]:
    done = set()
    for kind, what in stream.given[:upto]:
        done |= _done(*what) if kind == "wait" else {what}  # type: ignore[misc]
    return done


class Tensor(torch.Tensor):
    """Says that it lies on a CUDA device, and notes on which streams it is said to be used."""

    is_cuda = True

    def record_stream(self, stream: Stream) -> None:
        self.used_on = [*getattr(self, "used_on", ()), stream.name]


@pytest.fixture
def current(monkeypatch):
    """The current streams, the innermost last; work is given to that one."""
    stack = [Stream("home")]
    side = [Stream(f"side {i}") for i in range(branches.MOST)]

    @contextlib.contextmanager
    def within(stream):
        stack.append(stream)
        try:
            yield
        finally:
            stack.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stack[-1])
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(branches, "_streams", lambda device: side)
    stack[0].given.append(("work", "before"))
    return stack


def job(current, name, seen):
    def run():
        stream = current[-1]
        seen[name] = stream.before()
        stream.given.append(("work", name))
        return (torch.zeros(1).as_subclass(Tensor), [stream.name])

    return run


@pytest.mark.parametrize("at_once", [2, 3, 100])
def test_jobs_begin_after_what_came_before_and_overlap_and_what_comes_next_waits_for_all(current, at_once):
    seen: dict[str, set[str]] = {}
    names = [f"job {i}" for i in range(20)]
    results = branches.run(torch.zeros(1).as_subclass(Tensor), [job(current, name, seen) for name in names], at_once)
    count = min(at_once, branches.MOST)
    for i, name in enumerate(names):
        assert seen[name] == {"before", *names[i % count : i : count]}  # only those on its own stream come first
        assert results[i][1] == [f"side {i % count}"]
        assert results[i][0].used_on == ["home"]
    assert current[0].before() == {"before", *names}


def test_what_comes_after_a_job_that_raises_waits_for_those_that_were_begun(current):
    seen: dict[str, set[str]] = {}

    def fails():
        raise RuntimeError("no")

    jobs = [job(current, "first", seen), fails, job(current, "never", seen)]
    with pytest.raises(RuntimeError, match="no"):
        branches.run(torch.zeros(1).as_subclass(Tensor), jobs, 2)
    assert current[0].before() == {"before", "first"}
    assert len(current) == 1


@pytest.mark.parametrize("why", ["one job", "no room for two", "on the CPU", "inside a capture"])
def test_what_cannot_overlap_runs_on_the_current_stream_in_order(current, why, monkeypatch):
    seen: dict[str, set[str]] = {}
    names = ["a", "b", "c"][: 1 if why == "one job" else 3]
    tensor = torch.zeros(1) if why == "on the CPU" else torch.zeros(1).as_subclass(Tensor)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "inside a capture")
    branches.run(tensor, [job(current, name, seen) for name in names], 1 if why == "no room for two" else 3)
    assert [what for _, what in current[0].given] == ["before", *names]


@pytest.mark.parametrize(("waiting", "at_once"), [(0, branches.MOST), (40, 3), (66, 2), (67, 1), (132, 1)])
def test_all_programs_that_wait_for_each_other_find_room(waiting, at_once, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "_most_programs", lambda tensor: 132)
    monkeypatch.setattr(branches, "run", lambda tensor, jobs, most: asked.append(most))
    kernels.overlapping(torch.zeros(1), [], waiting)
    assert asked == [at_once]
