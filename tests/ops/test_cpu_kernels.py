"""What is special to the C++ kernels: threads, chunks of rows, the Gram norm, instruction sets, every small size."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support import assert_error_rule, make_problem, reference_gradient

from dante_kernels import ops
from dante_kernels.ops import Layer, backends

REASON = backends.why_not("cpp", torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend cpp: {REASON}")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch_size", [20, 100, 600])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_number_of_threads_does_not_change_a_bit(threads, batch_size, momentum):
    outcomes = []
    for count in (1, 2, 3, 7):
        threads(count)
        for _ in range(3):  # a team that finds the cores busy goes on alone
            problem = make_problem(seed=1, rows=1300, n_in=300, widths=(120, 40, 10))
            velocity = (torch.zeros_like(problem.weight), torch.zeros_like(problem.bias)) if momentum else (None, None)
            losses, norms = ops.sngd_epoch_(
                *problem.args[:4], None, batch_size, *problem.args[4:], 0.1,
                velocity_weight=velocity[0], velocity_bias=velocity[1], momentum=momentum, backend="cpp",
            )  # fmt: skip
            gradient = ops.layer_gradient(*problem.args, backend="cpp")
            h = ops.layer_forward(problem.x, problem.weight, problem.bias, "tanh", backend="cpp")
            parts = (losses, norms, problem.weight, problem.bias, *gradient, h)
            outcomes.append(torch.cat([part.flatten() for part in parts]))
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 255, 256, 257, 511, 512, 513, 769])
def test_chunks_of_rows_join_without_a_seam(threads, rows):
    threads(2)
    problem = make_problem(seed=2, rows=rows, n_in=70, widths=(130, 9))
    got = ops.layer_gradient(*problem.args, backend="cpp")
    torch32, exact = (reference_gradient(problem, dtype) for dtype in (torch.float32, torch.float64))
    for name, ours, theirs, truth in zip(("grad_weight", "grad_bias", "norm"), got, torch32, exact, strict=True):
        assert_error_rule(f"{rows} rows: {name}", ours, theirs, truth)


def small_batch(**more):
    """A problem of 12 rows and 60 outputs, which takes its norm from Gram matrices."""
    return make_problem(seed=3, rows=12, n_in=50, widths=(60, 4), class_indices=False, **more)


def test_the_gram_norm_gives_way_where_its_terms_cancel():
    """Equal rows with opposite residuals cancel to a gradient of zero, which products of Gram matrices would not see."""
    problem = small_batch()
    problem.suffix = []
    problem.activation, problem.bias = problem.activation.IDENTITY, None
    problem.x[6:] = problem.x[:6]
    z = problem.x @ problem.weight.t()
    problem.target = (z + torch.where(torch.arange(12) < 6, 1.0, -1.0)[:, None]).contiguous()
    _, _, exact = ops.layer_gradient(*problem.to(torch.float64).args, backend="reference")
    _, norm = ops.sngd_step_(*problem.args, 0.1, backend="cpp")
    assert exact.item() < 1e-6
    assert norm.item() < 1e-6


def test_the_gram_norm_keeps_its_digits_where_its_terms_cancel_in_part():
    problem = small_batch()
    problem.suffix, problem.activation, problem.bias = [], problem.activation.IDENTITY, None
    problem.x[6:] = problem.x[:6]
    z = problem.x @ problem.weight.t()
    signs = torch.where(torch.arange(12) < 6, 1.0, -1.0)[:, None]
    problem.target = (z + signs + 1e-3 * torch.rand(12, 60)).contiguous()
    _, _, exact = ops.layer_gradient(*problem.to(torch.float64).args, backend="reference")
    _, norm = ops.sngd_step_(*problem.args, 0.1, backend="cpp")
    assert norm.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_scale", [1e-21, 1e-10, 1.0, 1e10, 1e16])
@pytest.mark.parametrize("scale", [10.0**e for e in range(-38, 19, 2)])
def test_a_step_has_length_lr_at_any_scale_of_the_gradient(scale, x_scale, bias):
    problem = small_batch(bias=bias)
    problem.suffix, problem.activation = [], problem.activation.IDENTITY
    problem.target = torch.rand(12, 60) * scale
    problem.x *= x_scale
    problem.weight.zero_()
    if bias:
        problem.bias.zero_()
    _, _, exact = ops.layer_gradient(*problem.to(torch.float64).args, backend="reference")
    if not 1e-40 < exact < 1e37:
        return  # no float32, or hardly one
    _, norm = ops.sngd_step_(*problem.args, 0.5, backend="cpp")
    after = torch.cat([p.flatten() for p in (problem.weight, problem.bias) if p is not None])
    digits = 1e-5 if exact > 1e-33 else 1e-2  # denormal residuals have few
    assert norm.item() == pytest.approx(exact.item(), rel=digits)
    assert after.double().norm().item() == pytest.approx(0.5, rel=digits)


@pytest.mark.parametrize("lr", [1e-16, 1e12])
def test_a_step_is_right_for_any_rate(lr):
    problem = small_batch()
    problem.suffix, problem.activation = [], problem.activation.IDENTITY
    problem.x *= 1e-10 if lr > 1 else 1e10
    problem.target = torch.rand(12, 60) * (1e-18 if lr > 1 else 1e16)
    problem.weight.zero_()
    problem.bias.zero_()
    ops.sngd_step_(*problem.args, lr, backend="cpp")
    length = torch.cat([problem.weight.flatten(), problem.bias]).double().norm().item()
    assert length == pytest.approx(lr, rel=1e-5)


def test_members_that_fall_back_from_the_gram_norm_wait_for_each_other(threads):
    """A mini-batch that takes the Gram way, cancels, and is large enough for several members."""
    outcomes = []
    for count in (1, 2, 2, 2, 3):
        threads(count)
        problem = make_problem(seed=8, rows=1600, n_in=800, widths=(300,), activation="identity", class_indices=False)
        problem.bias = None
        pairs = problem.x.view(40, 2, 20, 800)
        pairs[:, 1] = pairs[:, 0]
        signs = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(40, 2, 20, 300).reshape(1600, 300)
        problem.target = problem.x @ problem.weight.t() + signs + 1e-4 * problem.target
        parts = ops.sngd_epoch_(*problem.args[:4], None, 40, *problem.args[4:], 1e-6, backend="cpp")
        outcomes.append(torch.cat([*parts, problem.weight.flatten()]))
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def long_problem():
    """A pass of it takes some 100 ms on one core."""
    return make_problem(seed=9, rows=20_000, n_in=784, widths=(100, 10))


def long_pass():
    """What a pass over it gives."""
    problem = long_problem()
    parts = ops.sngd_epoch_(*problem.args[:4], None, 100, *problem.args[4:], 0.1, backend="cpp")
    return torch.cat([*parts, problem.weight.flatten()])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs to choose its cores")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_second_thread_works():
    """More than the first thread's processor time is used: a helper that only waited would use next to nothing."""
    code = """
import sys, time, torch
sys.path[:0] = sys.argv[1:]
from test_cpu_kernels import long_pass
torch.set_num_threads(2)
end = time.monotonic() + 30
while time.monotonic() < end:
    all_threads, this_thread = time.process_time(), time.thread_time()
    long_pass()
    this_thread, all_threads = time.thread_time() - this_thread, time.process_time() - all_threads
    if all_threads > 1.4 * this_thread: break
else:
    sys.exit("no pass had help")
"""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-c", code, folder, os.path.dirname(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no pass had help" in done.stderr and os.getloadavg()[0] > len(os.sched_getaffinity(0)) - 0.5:
        pytest.skip("the cores are busy with something else")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs to choose its cores")
def test_helpers_that_are_sent_away_and_come_back_change_nothing(threads):
    """Two members on one core wait for each other's time slices, so the team breaks up and forms again all the time."""
    threads(1)
    expected = long_pass()
    cores = os.sched_getaffinity(0)
    threads(2)
    try:
        os.sched_setaffinity(0, {min(cores)})
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {min(cores)})
        for _ in range(4):
            assert torch.equal(long_pass(), expected)
    finally:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)


# One of so many pairs of inputs and outputs, as the first argument says, each with every number of rows.
SIZES = """
import sys
import torch
from dante_kernels.ops import backends
gradient, step = backends._load_cpp()[0].layer_gradient, backends._load_cpp()[0].sngd_step_
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
worst = 0.0
for n_in in range(1, 71):
    for n_out in range(1, 71):
        if (n_in + 3 * n_out) % int(sys.argv[1]):
            continue
        x = torch.randint(-3, 4, (70, n_in), generator=generator) / 2
        t = torch.randint(-3, 4, (70, n_out), generator=generator) / 2
        w = torch.randint(-2, 3, (n_out, n_in), generator=generator) / 2
        d = (x @ w.t() - t).double()
        # Small dyadic numbers: every sum is exact, so G of the first r rows is known to the last bit, up to its factor.
        sums = torch.cumsum(d[:, :, None] * x[:, None, :].double(), 0)
        for rows in range(1, 71):
            target = t[:rows]
            if n_out == 1 or rows % 7:
                got, _, norm = gradient(w, None, x[:rows], target, [], [], [0.0, 1.0, 1.0], 0)
            else:
                got, _, norm = gradient(w, None, x[:rows], target.t().contiguous().t(), [], [], [0.0, 1.0, 1.0], 0)
            expected = sums[rows - 1] * (2 / (rows * n_out))
            error = (got.double() - expected).abs().max() / max(1e-9, expected.abs().max())
            worst = max(worst, error.item(), abs(norm.item() - expected.norm().item()) / max(1e-9, expected.norm().item()))
            if rows % 5 == 1 and norm > 0:
                moved = w.clone()
                step(moved, None, x[:rows], target, [], [], [0.0, 1.0, 1.0], 0, torch.tensor(1.0))
                worst = max(worst, (w.double() - moved.double() - expected / expected.norm()).abs().max().item() / 4)
print(worst)
"""


@pytest.mark.parametrize("isa", ["", "generic"])
def test_every_size_from_1_to_70_is_right(isa, pairs):
    """All 343,000 combinations of rows, inputs and outputs, on the best instruction set and on the portable one."""
    environment = os.environ | {"DANTE_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", SIZES, str(pairs)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 2e-6


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_the_operator_tests_pass_on_every_instruction_set(isa):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"DANTE_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-k", "cpp", "-p", "no:cacheprovider"]
    command += ["tests/ops/test_operators.py", "tests/ops/test_promises.py"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if "which this processor or build does not have" in done.stdout:
        pytest.skip(f"this processor does not have {isa}")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_an_unknown_instruction_set_is_refused():
    code = "import torch; from dante_kernels import ops; ops.layer_forward(torch.ones(1, 1), torch.ones(1, 1), None, 'relu')"
    environment = os.environ | {"DANTE_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: DANTE_CPU_ISA: expected avx512, avx2 or generic, got 'mmx'" in done.stderr


def test_calls_from_several_threads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    def train(_):
        problem = make_problem(seed=5, rows=400, n_in=200, widths=(100, 10))
        ops.sngd_epoch_(*problem.args[:4], None, 50, *problem.args[4:], 0.1, backend="cpp")
        return problem.weight

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(train, range(8)))
    assert all(torch.equal(results[0], other) for other in results[1:])


FORKED = """
import os, signal, torch
import dante_kernels as dk

torch.set_num_threads(2)
torch.randn(2000, 2000).exp()  # torch's pool has its threads, the extension is not loaded yet
weight, x, target = torch.ones(100, 784), torch.ones(2000, 784), torch.zeros(2000, 100)
child = os.fork()
if child == 0:
    signal.alarm(60)
    dk.ops.sngd_epoch_(weight, None, x, target, None, 100, (), "relu", "mse", 0.1, backend="cpp")
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_process_that_was_forked_before_the_first_call_trains():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_largest_rates_make_steps_of_their_length(momentum):
    problem = make_problem(seed=6, rows=80, n_in=30, widths=(20, 3))
    velocity = {"velocity_weight": torch.zeros(20, 30), "velocity_bias": torch.zeros(20)} if momentum else {}
    before = problem.weight.clone()
    ops.sngd_step_(*problem.args, 3e38, momentum=momentum, backend="cpp", **velocity)
    assert torch.isfinite(problem.weight).all()
    assert 2e38 < (problem.weight.double() - before.double()).norm() <= 3e38


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_process_trains_as_its_parent_does(threads):
    """The pool's threads do not survive a fork; waiting for them would be for ever."""
    threads(1)
    expected = long_pass()[-784 * 100 :].view(100, 784).numpy()
    threads(2)
    problem = long_problem()
    torch.randn(2000, 2000).exp()  # the pool has its threads
    time.sleep(1.1)  # longer than a team that found the cores busy stays away
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        # Only this library's operators: torch's own would wait for ever.
        ops.sngd_epoch_(*problem.args[:4], None, 100, *problem.args[4:], 0.1, backend="cpp")
        os._exit(0 if (problem.weight.numpy() == expected).all() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


MEMORY = """
import resource, sys
import torch
from dante_kernels import ops
rows, n_in, n_out, batch, threads = map(int, sys.argv[2:])
torch.set_num_threads(threads)
x, y = torch.rand(rows, n_in).mul(200).to(getattr(torch, sys.argv[1])), torch.randint(0, 10, (rows,))
scale = 1 / 255 if x.dtype == torch.uint8 else 1.0
order = torch.randperm(rows)
w, b, u, c = torch.randn(n_out, n_in), torch.zeros(n_out), torch.randn(10, n_out), torch.zeros(10)
suffix = [ops.Layer(u, c, "relu")]
more = {"x_scale": scale, "backend": "cpp"}
run = lambda n: ops.sngd_epoch_(w, b, x, y, order[:n], min(n, batch), suffix, "relu", "mse", 0.1, **more)
run(1)  # code and libraries
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux gives it")
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out", "batch"), [(100_000, 200, 100, 100), (60_000, 300, 64, 60_000), (500, 2000, 1000, 100)]
)
@pytest.mark.parametrize(("dtype", "count"), [("float32", 1), ("float32", 2), ("uint8", 1)])
def test_the_memory_of_a_pass_is_its_layer_and_8_mib_a_thread(rows, n_in, n_out, batch, dtype, count):
    arguments = map(str, (dtype, rows, n_in, n_out, batch, count))
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    packed = 2 * 4 * 1.2 * n_in * n_out  # the weight and its gradient in the kernels' layout
    assert float(done.stdout) * 1024 <= packed + count * 8 * 2**20


def test_a_suffix_layer_may_appear_twice():
    problem = make_problem(seed=6, rows=9, n_in=8, widths=(5, 5, 5))
    shared = problem.suffix[0]
    problem.suffix = [shared, Layer(*shared)]
    got = ops.layer_gradient(*problem.args, backend="cpp")
    exact = reference_gradient(problem, torch.float64)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-7)


def test_a_direct_call_checks_what_memory_safety_needs():
    cpp = torch.ops.dante_cpp
    problem = make_problem(seed=7, widths=(4,), class_indices=False)
    rest = ([], [], [0.0, 1.0, 1.0], 0, torch.tensor(0.1), None, None, 0.0, False)
    for order in (torch.tensor([0, 7]), torch.tensor([-1])):
        with pytest.raises(RuntimeError, match="order: expected row numbers from 0 to 6"):
            cpp.sngd_epoch_(problem.weight, problem.bias, problem.x, problem.target, order, 2, *rest)
    with pytest.raises(RuntimeError, match="x: expected 5 columns"):
        cpp.sngd_step_(problem.weight, problem.bias, problem.x[:, :4], problem.target, *rest)
    with pytest.raises(RuntimeError, match="bias: expected 4 elements"):
        cpp.sngd_step_(problem.weight, problem.bias[:3], problem.x, problem.target, *rest)
