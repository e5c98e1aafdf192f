"""Prove and time the GPU kernels: one command, no arguments, under 8 minutes.

    python bench/gpu_check.py

First correctness: every operator against the float64 reference on the CPU by the error rule of the tests, equality of a
pass with its steps, short blocks and models in one launch, 200 repeats bitwise while another stream keeps the device busy,
capture and replay of passes and of short blocks as CUDA graphs, and compute-sanitizer on small cases where it is installed.
Only when all of that holds, the numbers that the cost model assumes, measured (`gpu_limits.py`), and timings.
Results go to bench/results/ as JSON with device, versions and commit. ``--device cpu`` with TRITON_INTERPRET=1 is
a rehearsal without a GPU, some minutes long: a few of the checks, no timings.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from support import ACTIVATIONS, LOSSES, Problem, assert_error_rule, make_problem, net, weights

import dante_kernels as dk
from bench import gpu_limits, gpu_timings
from bench.gpu_timings import ONE_BARRIER, PLANS, SWITCHES, chosen_plan, moved
from bench.peers.cuda_graph import graph_of
from dante_kernels import ops
from dante_kernels.ops import backends, blocks
from dante_kernels.training.run import matmul_precision

SHAPES = [  # rows, n_in, widths of the active layer and its suffix
    (1, 5, (4, 3)), (9, 7, (1,)), (20, 784, (100, 10)), (100, 784, (100, 10)), (100, 100, (10,)),
    (33, 784, (400, 200, 10)), (17, 65, (129, 31, 7, 5)), (50, 3072, (512, 10)), (40, 60, (30, 784)), (300, 784, (100, 10)),
    (60, 784, (100, 40)),
]  # fmt: skip
PASSES = {"highest": PLANS, "high": (*PLANS, ONE_BARRIER), "medium": (*PLANS, ONE_BARRIER)}  # for `chosen_plan`


class Skipped(Exception):
    """A check cannot be made here, and why."""


def cases(few: bool) -> Iterator[dict[str, Any]]:
    """The correctness cases: all losses, activations and depths, shapes, tails, with and without bias and momentum."""
    for i, (rows, n_in, widths) in enumerate(SHAPES[: 2 if few else None]):
        for loss in LOSSES:
            if loss != "cross_entropy" or widths[-1] > 1:
                yield {"seed": i, "rows": rows, "n_in": n_in, "widths": widths, "loss": loss}
    for i, activation in enumerate(ACTIVATIONS):
        for loss in LOSSES[: 1 if few else None]:
            for widths in ((12,), (12, 6), (12, 6, 4), (12, 6, 5, 4)):
                yield {
                    "seed": 20 + i, "rows": 27, "n_in": 19, "widths": widths, "loss": loss, "activation": activation,
                    "bias": len(widths) != 2,
                }  # fmt: skip


def results_of(problem: Problem, backend: str, momentum: float, nesterov: bool = False) -> list[torch.Tensor]:
    """What every operator gives for a problem: forward, gradient, then a pass of three steps and all that it changed."""
    out = [ops.layer_forward(problem.x, problem.weight, problem.bias, problem.activation, backend=backend)]
    out += [t for t in ops.layer_gradient(*problem.args, backend=backend) if t is not None]
    v = torch.zeros_like(problem.weight) if momentum else None
    vb = torch.zeros_like(problem.bias) if momentum and problem.bias is not None else None
    rows = problem.x.shape[0]
    order = torch.arange(rows - 1, -1, -1, device=problem.x.device)
    out += ops.sngd_epoch_(
        *problem.args[:4], order, max(1, -(-rows // 3)), *problem.args[4:], 0.1,
        velocity_weight=v, velocity_bias=vb, momentum=momentum, nesterov=nesterov, backend=backend,
    )  # fmt: skip
    return [t.detach().cpu() for t in (*out, problem.weight, problem.bias, v, vb) if t is not None]


def check_right(device: torch.device, few: bool) -> str:
    """Every case within the error rule, in every precision that torch's switch knows."""
    count = 0
    for precision in ("highest",) if few else ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        for case in cases(few):
            for rule in ((0.0, False), (0.9, case["seed"] % 2 == 0)):
                problem = make_problem(**case)
                truth = results_of(problem.to(torch.float64), "reference", *rule)
                theirs = results_of(moved(problem, device), "reference", *rule)
                for plan in PASSES[precision]:
                    with chosen_plan(plan):
                        ours = results_of(moved(problem, device), "triton", *rule)
                    for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
                        name = f"{plan}, {precision}, {case}, momentum and whether Nesterov's {rule}: result {i}"
                        if precision == "medium":  # torch's own switch does not make its products this narrow everywhere
                            assert (a - c).norm() <= 0.03 * c.norm() + 1e-6, name
                        else:
                            assert_error_rule(name, a, b, c)
                    count += 1
    torch.set_float32_matmul_precision("highest")
    return f"{count} cases"


def check_epoch_equals_steps(device: torch.device, few: bool) -> str:
    """A pass gives the bits of its steps taken one by one on gathered rows.

    The plan may be chosen by the number of rows, so where it is chosen all mini-batches are of one size.
    """
    runs = [(precision, plan) for precision in SWITCHES[: 1 if few else None] for plan in PASSES[precision]]
    for (precision, plan), case in itertools.product(runs, cases(few)):
        whole, single = (moved(make_problem(**case), device) for _ in range(2))
        rows = whole.x.shape[0]
        batch = max(1, rows // 3)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(device)
        order = order[: rows // batch * batch] if plan in ("auto", ONE_BARRIER) else order
        with chosen_plan(plan), matmul_precision(precision):
            values, norms = ops.sngd_epoch_(*whole.args[:4], order, batch, *whole.args[4:], 0.1, backend="triton")
            for step, chosen in enumerate(order.split(batch)):
                value, norm = ops.sngd_step_(
                    single.weight, single.bias, single.x[chosen], single.target[chosen], *single.args[4:], 0.1, backend="triton"
                )
                assert torch.equal(value, values[step]), f"{plan}, {case}: loss of step {step}"
                assert torch.equal(norm, norms[step]), f"{plan}, {case}: norm of step {step}"
        assert torch.equal(whole.weight, single.weight), f"{plan}, {case}: weight"
    return "all cases"


def check_repeats(device: torch.device, few: bool) -> str:
    """The same bits 200 times, while another stream keeps the device busy."""
    repeats = 3 if few else 200
    load = torch.randn(2048, 2048, device=device) if device.type == "cuda" else None
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    shapes = [SHAPES[0]] if few else [SHAPES[2], SHAPES[3], SHAPES[5], SHAPES[7]]
    runs = [(precision, plan) for precision in SWITCHES[: 1 if few else None] for plan in PASSES[precision]]
    for (precision, plan), (rows, n_in, widths) in itertools.product(runs, shapes):
        first = None
        for _ in range(repeats):
            if stream is not None:
                with torch.cuda.stream(stream):
                    load = (load @ load).clamp(-1, 1)
            problem = moved(make_problem(seed=3, rows=rows, n_in=n_in, widths=widths), device)
            with chosen_plan(plan), matmul_precision(precision):
                got = results_of(problem, "triton", 0.9)
            first = first or got
            same = all(torch.equal(a, b) for a, b in zip(first, got, strict=True))
            assert same, f"{plan}, {precision}, {n_in}-{widths} differs from run to run"
    return f"{repeats} repeats"


def check_skips(device: torch.device, few: bool) -> str:
    """NaN in the input, a class out of range and a row number out of range: the step is skipped and reported."""
    for plan, spoil in itertools.product(PLANS, ("x", "target", "order")):
        problem = moved(make_problem(seed=2, rows=8, class_indices=True), device)
        order = torch.arange(8, device=device)
        if spoil == "x":
            problem.x[1, 0] = torch.nan
        elif spoil == "target":
            problem.target[1] = 99
        elif device.type == "cuda":
            order[1] = 10**9
        else:
            continue
        before = problem.weight.clone()
        with chosen_plan(plan):
            _, norms = ops.sngd_epoch_(*problem.args[:4], order, 8, *problem.args[4:], 0.1, backend="triton")
        assert bool(norms.isnan().all()), spoil
        assert torch.equal(problem.weight, before), spoil
    return "NaN, class and row number"


def check_graph_capture(device: torch.device, few: bool) -> str:
    """A pass captured in a CUDA graph replays to the bits of the eager pass, and reads lr from the device."""
    if device.type != "cuda":
        raise Skipped("there are no CUDA graphs on this device")
    eager, captured = (moved(make_problem(seed=4, rows=100, n_in=784, widths=(100, 10)), device) for _ in range(2))
    lr = torch.tensor(0.1, device=device)
    order = torch.arange(100, device=device)

    def run(problem: Problem) -> None:
        ops.sngd_epoch_(*problem.args[:4], order, 20, *problem.args[4:], lr, backend="triton")

    start = captured.weight.clone(), captured.bias.clone()
    graph = graph_of(lambda: run(captured))
    captured.weight.copy_(start[0])
    captured.bias.copy_(start[1])
    for rate in (0.1, 0.05):
        lr.fill_(rate)
        run(eager)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager.weight, captured.weight)
    return "replays to the eager bits"


def check_graph_replays(device: torch.device, few: bool) -> str:
    """Passes that the package replays from CUDA graphs give the bits of launched ones, for new orders and rates."""
    if device.type != "cuda":
        raise Skipped("there are no CUDA graphs on this device")
    from dante_kernels.kernels import graphs

    passes = [(plan, "highest", shape) for plan in ("fused", "streamed", "library") for shape in SHAPES]
    passes.append(("streamed", "high", (300, 3072, (1024, 10))))  # some of whose products are the library's
    for plan, precision, (rows, n_in, widths) in passes:
        pair = [moved(make_problem(seed=6, rows=rows, n_in=n_in, widths=widths), device) for _ in range(2)]
        for call in range(4):
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(call)).to(device)
            results = []
            for switch, p in zip(("1", "0"), pair, strict=True):
                with chosen_plan(plan, graphs=switch), matmul_precision(precision):
                    out = ops.sngd_epoch_(*p.args[:4], order, -(-rows // 3), *p.args[4:], 0.1 / (call + 1), backend="triton")
                results.append((*out, p.weight, p.bias))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), f"{plan}, {n_in}-{widths}, call {call}"
    kept = [entry for entry in graphs._shared.entries.values() if entry.recording is not None]
    assert graphs._shared.usable, "a recording failed"
    assert len(kept) >= len(passes), "nothing was replayed"
    return f"{len(kept)} graphs, {sum(entry.bytes for entry in kept) / 2**20:.1f} MiB"


def check_short_blocks_and_models(device: torch.device, few: bool) -> str:
    """Rounds of short blocks in one launch are those of the reference, and models side by side have the bits of each alone."""
    n_in, rows = (20, 40) if few else (784, 400)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(rows, n_in, generator=generator), torch.randint(0, 10, (rows,), generator=generator)
    rules = ({"lr": 0.02}, {"lr": 0.02, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.9, "direction": "nesterov"})

    def fresh(seed: int) -> torch.nn.Sequential:
        return net(n_in, 10 if few else 100, 10, seed=seed)  # tanh, which has no kink for a rounding to fall on either side of

    for rule, parallel, precision in itertools.product(rules, (False, True), SWITCHES):
        schedule = dk.RoundRobin(rounds=2, inner_epochs=1, inner_steps=2, parallel=parallel)
        settings = {"schedule": schedule, "relative_lr": True, "batch_size": 20, "precision": precision}
        trained = []
        for where, dtype, backend in (("cpu", torch.float64, "reference"), ("cpu", torch.float32, "reference"),
                                      (device, torch.float32, "triton")):  # fmt: skip
            model = fresh(0).to(where, dtype)
            dk.fit(model, x.to(where, dtype), y.to(where), backend=backend, shuffle=False, **rule, **settings)
            trained.append(weights(model).cpu())
        if precision == "highest":
            assert_error_rule(f"{rule}, parallel {parallel}", trained[2], trained[1], trained[0])
        apart = (trained[2] - trained[0]).norm() / trained[0].norm()
        assert apart < 0.01, f"{rule}, parallel {parallel}, {precision}: {apart:.1e}"
        alone, together = ([fresh(seed).to(device) for seed in range(3)] for _ in range(2))
        rates = [0.01, 0.02, 0.03]
        for model, lr in zip(alone, rates, strict=True):
            dk.fit(model, x.to(device), y.to(device), backend="triton", **rule | {"lr": lr}, **settings)
        dk.fit_many(together, x.to(device), y.to(device), backend="triton", **rule | {"lr": rates}, **settings)
        for i, (one, other) in enumerate(zip(alone, together, strict=True)):
            assert torch.equal(weights(one), weights(other)), f"{rule}, parallel {parallel}, {precision}: model {i}"
    return "3 rules, in turn and in parallel, in 2 precisions"


def check_recorded_blocks(device: torch.device, few: bool) -> str:
    """Rounds of short blocks of deeper nets, replayed, have the bits that they have launch by launch, under every plan, alone
    and beside other models, of which there are more than streams.
    """
    from dante_kernels.kernels import branches, graphs

    n_in, rows = (20, 40) if few else (784, 400)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(rows, n_in, generator=generator), torch.randint(0, 10, (rows,), generator=generator)
    steps = {"lr": 0.02, "relative_lr": True, "momentum": 0.9, "direction": "nesterov", "max_norm": 0.6, "batch_size": 20}
    turns = {"rounds": 2 if few else 4, "inner_epochs": 1, "inner_steps": 1 if few else 5}
    for name in ("auto", "fused", "streamed", "library"):
        short, trained = dk.RoundRobin(**turns, parallel=name in ("auto", "streamed")), []
        for switch in ("0", "1"):
            model = net(n_in, 30, 20, 10, seed=0).to(device)
            with chosen_plan(name, graphs=switch):
                dk.fit(model, x.to(device), y.to(device), schedule=short, backend="triton", **steps)
            trained.append(weights(model))
            if switch == "1" and device.type == "cuda":
                entries = [entry for key, entry in graphs._shared.entries.items() if key[0] is blocks._apart and name in key]
                assert graphs._shared.usable, "a recording failed"
                assert any(entry.recording is not None for entry in entries), f"plan {name}: nothing was replayed"
        assert torch.equal(*trained), f"plan {name}: replayed blocks differ"
        if name not in ("auto", "fused"):  # which launches they are does not matter to the streams
            continue
        together = [net(n_in, 30, 20, 10, seed=seed).to(device) for seed in range(2 if few else branches.MOST + 2)]
        with chosen_plan(name):
            dk.fit_many(together, x.to(device), y.to(device), schedule=short, backend="triton", **steps)
        for seed, model in enumerate(together):
            alone = net(n_in, 30, 20, 10, seed=seed).to(device)
            with chosen_plan(name, graphs="0"):
                dk.fit(alone, x.to(device), y.to(device), schedule=short, backend="triton", **steps)
            assert torch.equal(weights(alone), weights(model)), f"plan {name}: model {seed} of several differs"
    return "4 plans"


def check_sanitizer(device: torch.device, few: bool) -> str:
    """memcheck and racecheck find nothing on the small cases."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if device.type != "cuda" or tool is None:
        raise Skipped("compute-sanitizer is not available")
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--sanitize"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
        assert done.returncode == 0, f"{kind}: {done.stdout[-2000:]} {done.stderr[-500:]}"
    return "memcheck and racecheck are clean"


CHECKS = [
    check_right,
    check_epoch_equals_steps,
    check_repeats,
    check_skips,
    check_graph_capture,
    check_graph_replays,
    check_short_blocks_and_models,
    check_recorded_blocks,
    check_sanitizer,
]


def environment(device: torch.device) -> dict[str, str]:
    """What the results belong to."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    """Run the checks, then the timings; exit status 0 only where every check held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the results file")
    parser.add_argument("--sanitize", action="store_true", help="only run the small cases, for compute-sanitizer")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    reason = backends.why_not("triton", device, torch.float32)
    if reason is None and device.type == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device is visible to torch"
    if reason is not None:
        print(f"the triton backend cannot be used: {reason}", file=sys.stderr)
        return 2
    if arguments.sanitize:
        for plan, case in itertools.product(PLANS, list(cases(few=True))[::3]):
            with chosen_plan(plan):
                results_of(moved(make_problem(**case), device), "triton", 0.9)
        return 0
    report: dict[str, Any] = {"environment": environment(device), "checks": {}, "timings": []}
    for check in CHECKS:
        begin = time.perf_counter()
        outcome: dict[str, Any]
        try:
            outcome = {"status": "passed", "what": check(device, device.type == "cpu")}
        except Skipped as reason:
            outcome = {"status": "skipped", "what": str(reason)}
        except Exception as error:  # a report of what failed is the point of this script
            traceback.print_exc()
            outcome = {"status": "failed", "what": f"{type(error).__name__}: {error}"[:2000]}
        outcome["seconds"] = round(time.perf_counter() - begin, 1)
        report["checks"][check.__name__] = outcome
        print(f"{check.__name__}: {outcome['status']} ({outcome['what']}), {outcome['seconds']} s", flush=True)
    passed = all(outcome["status"] != "failed" for outcome in report["checks"].values())
    if passed and device.type == "cuda":
        report["limits"] = gpu_limits.measure(device)
        for name, number in report["limits"]["device"].items():
            print(f"{name}: assumed {number['assumed']}, measured {number['measured']:.4g}")
        report["timings"], report["many_models"] = gpu_timings.steps(device), gpu_timings.many_models(device)
    elif not passed:
        print("no timings: a speed is not reported while a check fails", file=sys.stderr)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = report["environment"]["device"].lower().replace(" ", "-").replace(",", "")
    path = arguments.output / f"gpu-check-{name}-{report['environment']['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"results: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
