"""The checks of `gpu_check.py`: each takes a `Setting`, says what it has seen, and raises where something is wrong.

Those of `OF_A_PLAN` are made for each of the GPU plans, the others once. Of a `dry` setting a check only launches, and nothing
is judged, so that all its kernels can be compiled beforehand (`gpu_compile.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from support import ACTIVATIONS, FLOOR, LOSSES, TINY, Problem, make_problem, net, weights
from torch.utils._python_dispatch import TorchDispatchMode

import dante_kernels as dk
from bench.gpu_timings import ONE_BARRIER, PLANS, SWITCHES, chosen_plan, moved
from bench.peers.cuda_graph import graph_of
from dante_kernels import ops
from dante_kernels.ops import blocks
from dante_kernels.training.run import matmul_precision

SHAPES = [  # rows, n_in, widths of the active layer and its suffix
    (1, 5, (4, 3)), (9, 7, (1,)), (20, 784, (100, 10)), (100, 784, (100, 10)), (100, 100, (10,)),
    (33, 784, (400, 200, 10)), (17, 65, (129, 31, 7, 5)), (50, 3072, (512, 10)), (40, 60, (30, 784)), (300, 784, (100, 10)),
    (60, 784, (100, 40)),
]  # fmt: skip
PRECISIONS = (*SWITCHES, "medium")
BF16_ERROR = 0.03  # of a result's norm, under `medium`: torch's own switch does not make its products this narrow everywhere


class Skipped(Exception):
    """A check cannot be made here, and why."""


class Setting(NamedTuple):
    """Where a check is made, and how."""

    device: torch.device
    plan: str  # as `chosen_plan` takes it; of no matter to a check that is made once
    few: bool = False  # a few cases alone, for a rehearsal
    dry: bool = False  # launch alone

    @property
    def on_gpu(self) -> bool:
        """Whether kernels run on a GPU, or would."""
        return self.dry or self.device.type == "cuda"

    def precisions(self) -> tuple[str, ...]:
        """Settings of torch's switch that this plan is checked under; plain float32 has no form with one barrier."""
        return PRECISIONS[1 if self.plan == ONE_BARRIER else 0 :][: 1 if self.few else None]

    def expect(self, holds: bool, what: str) -> None:
        """Raise unless it holds, or nothing is judged."""
        if not (self.dry or holds):
            raise AssertionError(what)


def cases(few: bool) -> Iterator[dict[str, Any]]:
    """The correctness cases: all losses, activations and depths, shapes, tails, with and without bias and momentum."""
    for i, (rows, n_in, widths) in enumerate(SHAPES[: 2 if few else None]):
        for loss in LOSSES:
            if loss != "cross_entropy" or widths[-1] > 1:
                yield {"seed": i, "rows": rows, "n_in": n_in, "widths": widths, "loss": loss}
    for i, activation in enumerate(ACTIVATIONS):
        for loss in LOSSES[: 1 if few else None]:
            depths = ((12,), (12, 6), (12, 6, 4), (12, 6, 5, 4))
            for widths in depths[i % 4 : i % 4 + 1] if few else depths:
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


class Tf32Products(TorchDispatchMode):
    """torch's float32 matrix products with their operands cut to tf32's 10 bits, as matrix units read them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            args = (*args[:-2], *((a.contiguous().view(torch.int32) & -8192).view(torch.float32) for a in args[-2:]))
        return func(*args, **kwargs or {})


def allowed_error(precision: str, exact: torch.Tensor, *theirs: torch.Tensor) -> float:
    """How far a result may be from the exact one: twice as far as the worst of theirs, by the tests' error rule."""
    if precision == "medium":
        return BF16_ERROR * float(exact.norm()) + 1e-6
    return 2 * max(float((t.double() - exact).norm()) for t in theirs) + FLOOR * float(exact.norm()) + TINY


def check_right(at: Setting) -> str:
    """Every case within the error rule, in every precision that torch's switch knows.

    Under `high` the composition that ours are held against is torch's on this device or the same with operands cut to tf32,
    whichever is further from the truth: which of its products torch makes in tf32 is cuBLAS's choice.
    """
    count, worst, wrong = 0, {}, []
    for precision, case in itertools.product(at.precisions(), cases(at.few)):
        for rule in ((0.0, False), (0.9, case["seed"] % 2 == 0)):
            problem = make_problem(**case)
            with matmul_precision(precision):
                with chosen_plan(at.plan):
                    ours = results_of(moved(problem, at.device), "triton", *rule)
                if at.dry:
                    continue
                theirs = [results_of(moved(problem, at.device), "reference", *rule)]
            exact = results_of(problem.to(torch.float64), "reference", *rule)
            if precision == "high":
                with Tf32Products():
                    theirs.append(results_of(problem.to(torch.float32), "reference", *rule))
            for i, (a, c, *b) in enumerate(zip(ours, exact, *theirs, strict=True)):
                ratio = float((a.double() - c).norm()) / allowed_error(precision, c, *b)
                worst[precision] = max(worst.get(precision, 0.0), ratio)
                if not ratio <= 1:
                    wrong.append(f"{precision}, {case}, momentum, Nesterov {rule}: result {i} by {ratio:.3g} times")
            count += 1
    at.expect(not wrong, f"{len(wrong)} results are further from float64 than allowed: {'; '.join(wrong[:5])}")
    return f"{count} cases; error over what is allowed, at most " + ", ".join(f"{k} {v:.2g}" for k, v in worst.items())


def check_epoch_equals_steps(at: Setting) -> str:
    """A pass gives the bits of its steps taken one by one on gathered rows.

    The plan may be chosen by the number of rows, so where it is chosen all mini-batches are of one size.
    """
    for precision, case in itertools.product(at.precisions()[:2], cases(at.few)):
        whole, single = (moved(make_problem(**case), at.device) for _ in range(2))
        rows = whole.x.shape[0]
        batch = max(1, rows // 3)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(at.device)
        order = order[: rows // batch * batch] if at.plan in ("auto", ONE_BARRIER) else order
        with chosen_plan(at.plan), matmul_precision(precision):
            values, norms = ops.sngd_epoch_(*whole.args[:4], order, batch, *whole.args[4:], 0.1, backend="triton")
            for step, chosen in enumerate(order.split(batch)):
                got = ops.sngd_step_(
                    single.weight, single.bias, single.x[chosen], single.target[chosen], *single.args[4:], 0.1, backend="triton"
                )
                for name, all_steps, one in zip(("loss", "norm"), (values, norms), got, strict=True):
                    where = f"{precision}, {case}: {name} of step {step}"
                    at.expect(torch.equal(all_steps[step], one), where)
        at.expect(torch.equal(whole.weight, single.weight), f"{precision}, {case}: weight")
    return "all cases"


def check_repeats(at: Setting) -> str:
    """The same bits 200 times, while another stream keeps the device busy."""
    repeats = 1 if at.dry else 3 if at.few else 200
    busy = at.device.type == "cuda"
    load = torch.randn(2048, 2048, device=at.device) if busy else None
    stream = torch.cuda.Stream(at.device) if busy else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(at.device))
    shapes = [SHAPES[0]] if at.few else [SHAPES[2], SHAPES[3], SHAPES[5], SHAPES[7]]
    for precision, (rows, n_in, widths) in itertools.product(at.precisions()[:2], shapes):
        start, first = moved(make_problem(seed=3, rows=rows, n_in=n_in, widths=widths), at.device), None
        for _ in range(repeats):
            if stream is not None:
                with torch.cuda.stream(stream):
                    load = (load @ load).clamp(-1, 1)
            with chosen_plan(at.plan), matmul_precision(precision):
                got = results_of(moved(start, at.device), "triton", 0.9)
            first = first or got
            same = [torch.equal(a, b) for a, b in zip(first, got, strict=True)]
            at.expect(all(same), f"{precision}, {n_in}-{widths} differs from run to run: {same}")
    return f"{repeats} repeats"


def check_skips(at: Setting) -> str:
    """NaN in the input, a class out of range and a row number out of range: the step is skipped and reported."""
    for spoil in ("x", "target", "order")[: 3 if at.device.type == "cuda" else 2]:  # on the CPU a row number is checked before
        problem = moved(make_problem(seed=2, rows=8, class_indices=True), at.device)
        order = torch.arange(8, device=at.device)
        if spoil == "x":
            problem.x[1, 0] = torch.nan
        elif spoil == "target":
            problem.target[1] = 99
        else:
            order[1] = 10**9
        before = problem.weight.clone()
        with chosen_plan(at.plan):
            _, norms = ops.sngd_epoch_(*problem.args[:4], order, 8, *problem.args[4:], 0.1, backend="triton")
        at.expect(bool(norms.isnan().all()), f"{spoil}: the norm is not NaN")
        at.expect(torch.equal(problem.weight, before), f"{spoil}: the weight has changed")
    return "NaN, class and row number"


def check_graph_capture(at: Setting) -> str:
    """A pass captured in a CUDA graph replays to the bits of the eager pass, and reads lr from the device."""
    if not at.on_gpu:
        raise Skipped("there are no CUDA graphs on this device")
    eager, captured = (moved(make_problem(seed=4, rows=100, n_in=784, widths=(100, 10)), at.device) for _ in range(2))
    lr = torch.tensor(0.1, device=at.device)
    order = torch.arange(100, device=at.device)

    def run(problem: Problem) -> None:
        ops.sngd_epoch_(*problem.args[:4], order, 20, *problem.args[4:], lr, backend="triton")

    if at.dry:
        run(eager)
        return "launched"
    start = captured.weight.clone(), captured.bias.clone()
    graph = graph_of(lambda: run(captured))
    captured.weight.copy_(start[0])
    captured.bias.copy_(start[1])
    for rate in (0.1, 0.05):
        lr.fill_(rate)
        run(eager)
        graph.replay()
    torch.cuda.synchronize()
    at.expect(torch.equal(eager.weight, captured.weight), "the replayed passes differ from the eager ones")
    return "replays to the eager bits"


def check_graph_replays(at: Setting) -> str:
    """Passes that the package replays from CUDA graphs give the bits of launched ones, for new orders and rates."""
    if not at.on_gpu:
        raise Skipped("there are no CUDA graphs on this device")
    from dante_kernels.kernels import graphs

    passes = [(plan, "highest", shape) for plan in ("fused", "streamed", "library") for shape in SHAPES]
    passes.append(("streamed", "high", (300, 3072, (1024, 10))))  # some of whose products are the library's
    for plan, precision, (rows, n_in, widths) in passes:
        pair = [moved(make_problem(seed=6, rows=rows, n_in=n_in, widths=widths), at.device) for _ in range(2)]
        for call in range(1 if at.dry else 4):
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(call)).to(at.device)
            results = []
            for switch, p in zip(("1", "0"), pair, strict=True):
                with chosen_plan(plan, graphs=switch), matmul_precision(precision):
                    out = ops.sngd_epoch_(*p.args[:4], order, -(-rows // 3), *p.args[4:], 0.1 / (call + 1), backend="triton")
                results.append((*out, p.weight, p.bias))
            same = [torch.equal(a, b) for a, b in zip(*results, strict=True)]
            at.expect(all(same), f"{plan}, {n_in}-{widths}, call {call}: {same}")
    kept = [entry for entry in graphs._shared.entries.values() if entry.recording is not None]
    at.expect(graphs._shared.usable, "a recording failed")
    found = f"{len(kept)} graphs, {sum(entry.bytes for entry in kept) / 2**20:.1f} MiB"
    at.expect(len(kept) >= len(passes), f"of {len(passes)} passes {found} are there: not recorded, or gone for others")
    return found


def check_short_blocks_and_models(at: Setting) -> str:
    """Rounds of short blocks in one launch are those of the reference, and models side by side have the bits of each alone."""
    n_in, rows = (20, 40) if at.few else (784, 400)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(rows, n_in, generator=generator), torch.randint(0, 10, (rows,), generator=generator)
    rules = ({"lr": 0.02}, {"lr": 0.02, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.9, "direction": "nesterov"})

    def fresh(seed: int) -> torch.nn.Sequential:
        # tanh, which has no kink for a rounding to fall on either side of.
        return net(n_in, 10 if at.few else 100, 10, seed=seed)

    for rule, parallel, precision in itertools.product(rules[2 if at.few else 0 :], (False, True), SWITCHES):
        name = f"{rule}, parallel {parallel}, {precision}"
        schedule = dk.RoundRobin(rounds=2, inner_epochs=1, inner_steps=2, parallel=parallel)
        settings = {"schedule": schedule, "relative_lr": True, "batch_size": 20, "precision": precision}
        trained = []
        for where, dtype, backend in ((at.device, torch.float32, "triton"), ("cpu", torch.float32, "reference"),
                                      ("cpu", torch.float64, "reference"))[: 1 if at.dry else 3]:  # fmt: skip
            model = fresh(0).to(where, dtype)
            dk.fit(model, x.to(where, dtype), y.to(where), backend=backend, shuffle=False, **rule, **settings)
            trained.append(weights(model).cpu())
        if not at.dry:
            ours, theirs, exact = trained
            error = float((ours.double() - exact).norm())
            at.expect(error < 0.01 * float(exact.norm()), f"{name}: error {error:.1e}")
            if precision == "highest":
                most = allowed_error(precision, exact, theirs)
                at.expect(error <= most, f"{name}: error {error:.3g}, allowed {most:.3g}")
        alone, together = ([fresh(seed).to(at.device) for seed in range(3)] for _ in range(2))
        rates = [0.01, 0.02, 0.03]
        for model, lr in zip(alone, rates, strict=True):
            dk.fit(model, x.to(at.device), y.to(at.device), backend="triton", **rule | {"lr": lr}, **settings)
        dk.fit_many(together, x.to(at.device), y.to(at.device), backend="triton", **rule | {"lr": rates}, **settings)
        for i, (one, other) in enumerate(zip(alone, together, strict=True)):
            at.expect(torch.equal(weights(one), weights(other)), f"{name}: model {i}")
    return f"{1 if at.few else len(rules)} rules, in turn and in parallel, in 2 precisions"


def check_recorded_blocks(at: Setting) -> str:
    """Rounds of short blocks of deeper nets, replayed, have the bits that they have launch by launch, under every plan, alone
    and beside other models, of which there are more than streams.
    """
    from dante_kernels.kernels import branches, graphs

    n_in, rows = (20, 40) if at.few else (784, 400)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(rows, n_in, generator=generator), torch.randint(0, 10, (rows,), generator=generator)
    steps = {"lr": 0.02, "relative_lr": True, "momentum": 0.9, "direction": "nesterov", "max_norm": 0.6, "batch_size": 20}
    turns = {"rounds": 2 if at.few else 4, "inner_epochs": 1, "inner_steps": 1 if at.few else 5}
    for name in ("auto", "fused", "streamed", "library"):
        short, trained = dk.RoundRobin(**turns, parallel=name in ("auto", "streamed")), []
        for switch in ("0", "1"):
            model = net(n_in, 30, 20, 10, seed=0).to(at.device)
            with chosen_plan(name, graphs=switch):
                dk.fit(model, x.to(at.device), y.to(at.device), schedule=short, backend="triton", **steps)
            trained.append(weights(model))
            if switch == "1" and at.device.type == "cuda":
                entries = [entry for key, entry in graphs._shared.entries.items() if key[0] is blocks._apart and name in key]
                at.expect(graphs._shared.usable, "a recording failed")
                at.expect(any(entry.recording is not None for entry in entries), f"plan {name}: nothing was replayed")
        at.expect(torch.equal(*trained), f"plan {name}: replayed blocks differ")
        if name not in ("auto", "fused"):  # which launches they are does not matter to the streams
            continue
        together = [net(n_in, 30, 20, 10, seed=seed).to(at.device) for seed in range(2 if at.few else branches.MOST + 2)]
        with chosen_plan(name):
            dk.fit_many(together, x.to(at.device), y.to(at.device), schedule=short, backend="triton", **steps)
        for seed, model in enumerate([] if at.dry else together):
            alone = net(n_in, 30, 20, 10, seed=seed).to(at.device)
            with chosen_plan(name, graphs="0"):
                dk.fit(alone, x.to(at.device), y.to(at.device), schedule=short, backend="triton", **steps)
            at.expect(torch.equal(weights(alone), weights(model)), f"plan {name}: model {seed} of several differs")
    return "4 plans"


Check = Callable[[Setting], str]
OF_A_PLAN: dict[str, Check] = {
    "right": check_right,
    "epoch_equals_steps": check_epoch_equals_steps,
    "repeats": check_repeats,
    "skips": check_skips,
}
ONCE: dict[str, Check] = {
    "short_blocks_and_models": check_short_blocks_and_models,
    "recorded_blocks": check_recorded_blocks,
    "graph_replays": check_graph_replays,
    "graph_capture": check_graph_capture,
}


def names_and_plans() -> list[tuple[str, str]]:
    """All checks, with the plan that each is made for."""
    return [*itertools.product(OF_A_PLAN, (*PLANS, ONE_BARRIER)), *((name, "auto") for name in ONCE)]


def make(name: str, at: Setting) -> str:
    """Make the check of this name."""
    return (OF_A_PLAN | ONCE)[name](at)
