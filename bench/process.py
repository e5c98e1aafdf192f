"""The processes that measure: each bound to its cores, and followed by another where a method kills it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent


def texts_of(methods: str | None) -> list[str]:
    """The texts of --methods."""
    return [text.strip() for text in (methods or "").split(";") if text.strip()]


def child(settings: Row) -> Iterator[Row]:
    """The messages of a measuring process. Where a method kills it, the next one goes on there, without that method."""
    dead: dict[str, str] = {}
    first = 0
    with tempfile.NamedTemporaryFile("r") as mark:
        while True:
            status = yield from messages(settings | {"dead": dead, "first": first, "mark": mark.name})
            if status == 0:
                return
            if status > 0 or -status in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it, or who ended it, wants an end
                raise SystemExit(status if status > 0 else 128 - status)
            mark.seek(0)
            first, where, name = json.loads(mark.read() or '[0, "its first steps", ""]')
            how = f"ended the measuring process by {signal.Signals(-status).name} in {where}"
            print(f"dante bench: {name or 'something'} {how}", file=sys.stderr)
            if not name or name in dead:
                raise SystemExit(1)
            dead[name] = f"{how}; left out since"


def messages(settings: Row) -> Generator[Row, None, int]:
    """The messages of one measuring process, which takes the same dante_kernels as this one; its exit status at the end."""
    import dante_kernels

    package = str(Path(dante_kernels.__file__).resolve().parent.parent)
    command = [sys.executable, str(ROOT / "bench" / "__main__.py"), "--child", json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": package}) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        except BaseException:  # or the end of this process would wait for the other's
            process.terminate()
            raise
    return process.returncode


def measure_here(settings: Row) -> int:
    """Be a measuring process: bind to the cores, then write messages to stdout, where nothing else may write.

    Gives the exit status: 2, with one line on stderr, where the data set cannot be had.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: Row) -> None:
        print(json.dumps(message), file=out, flush=True)

    threads = settings["threads"]
    if threads is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"  # JAX takes all else
    else:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or JAX takes most of the GPU's memory
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(settings["precision"])
    device = torch.device(settings["device"])
    if settings["mode"] == "serve":
        from . import against

        against.serve(sys.stdin, send, device, settings["quick"], settings["rows"])
        return 0
    try:
        measure_rows(settings, device, send)
    except (OSError, ImportError, ValueError) as error:
        print(f"dante bench: {error}", file=sys.stderr)
        return 2
    return 0


def measure_rows(settings: Row, device: Any, send: Callable[[Row], None]) -> None:
    """Measure the kinds asked for; each row is sent as soon as it is there."""
    import dante_kernels

    from . import limits, measure, report, scaling, workloads

    shared = report.environment(device, Path(dante_kernels.__file__).resolve().parent.parent)
    shared["device"] += f", {settings['isa']} kernels" if settings["isa"] else ""
    known = limits.of(device, settings["threads"])
    shared |= {"peak": known.peak, "bandwidth": known.bandwidth}
    peak = "not known" if known.peak is None else f"{known.peak / 1e9:.4g} GFLOP/s"
    print(f"limits: peak {peak}, main memory {known.bandwidth / 1e9:.4g} GB/s", file=sys.stderr)
    texts = texts_of(settings["methods"])

    def wanted(names: list[str]) -> list[str]:
        def named(name: str) -> bool:  # a whole name is that method alone
            return any(text == name if text in workloads.METHODS else text in name for text in texts)

        some = [name for name in names if name == workloads.OURS or not texts or named(name)]
        return [name for name in some if not (settings["quick"] and "compile" in name)]

    mark = os.open(settings["mark"], os.O_WRONLY)  # no message: it would wake the parent while something is timed
    for number, (kind, work, workload, cold) in list(enumerate(cases(settings, device)))[settings["first"] :]:
        where = kind if workload is None else f"{kind}: {workload.net}, batch {workload.batch}, {work}"

        def at(name: str, place: tuple[int, str] = (number, where)) -> None:
            os.pwrite(mark, json.dumps([*place, name]).ljust(500).encode(), 0)

        at("")
        watch = measure.Watch(settings["dead"], at)
        if workload is None:
            measure_quality(settings, device, wanted(list(workloads.METHODS)), known, watch, shared, send)
            continue
        names = wanted(scaling.METHODS if kind == "scaling" else workload.methods(kind))
        what = "pass" if kind == "scaling" else kind
        for row in measure.compare(what, workload, device, names, settings["repeats"], known, cold, watch):
            send({"row": shared | row | ({"kind": kind, "work": work} if kind == "scaling" else {})})


def cases(settings: Row, device: Any) -> list[tuple[str, str, Any, bool]]:
    """What is to be measured, in order: (kind, work, workload, whether with a cold cache); quality finds its own workload."""
    from . import measure, scaling, workloads

    found: list[tuple[str, str, Any, bool]] = []
    for kind in settings["kinds"]:
        if kind == "quality":
            found.append((kind, "", None, False))
        elif kind == "scaling":
            found += [(kind, work, workload, False) for work, workload in scaling.study(settings["quick"])]
        else:
            several = [workload.sized(settings["rows"]) for workload in workloads.of(kind, settings["quick"], device)]
            for cold in (False, True) if kind == "step" and device.type == "cuda" else (False,):
                found += [(kind, w.what if kind == "pass" else measure.STEP, w, cold) for w in several]
    return found


def measure_quality(
    settings: Row, device: Any, names: list[str], known: Any, watch: Any, shared: Row, send: Callable[[Row], None]
) -> None:
    """Measure times to quality; `shared` are fields of all rows."""
    from . import quality

    directory = settings["data_dir"] and Path(settings["data_dir"])
    split, workload = quality.load(settings["data"], directory, settings["rows"] if settings["quick"] else None)
    target = settings["target"] or quality.TARGETS[settings["data"]]
    several = quality.compare(split, workload, device, names, settings["repeats"], settings["rounds"], target, known, watch)
    for number, pairs in enumerate(several):
        for row in quality.with_ratios([row for row, _ in pairs]):
            send({"row": shared | row})
        for _, curve in pairs:
            if curve is not None and number == 0:  # it is the first seed's
                send({"curve": curve})
