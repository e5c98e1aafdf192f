"""`explain` says what the cost model chooses, for any model and without a GPU."""

import subprocess
import sys

import pytest
import torch
from support import net
from torch import nn

import dante_kernels as dk

pytest.importorskip("triton", reason="the GPU plans are triton's")


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch):
    monkeypatch.delenv("DANTE_GPU_PLAN", raising=False)
    monkeypatch.delenv("DANTE_BACKEND", raising=False)


def test_the_table_has_each_layer_s_plan_why_time_and_limit():
    from dante_kernels.kernels import plan

    found = dk.explain(net(784, 400, 200, 100, 10), 20, momentum=0)
    text = str(found)
    assert repr(found) == text
    assert (
        "784-400-200-100-10, mse, batch 20, momentum 0, x float32, precision highest: modelled for an H200, not measured"
        in text
    )
    assert [(layer.n_in, layer.n_out) for layer in found.layers] == [(784, 400), (400, 200), (200, 100), (100, 10)]
    for i, layer in enumerate(found.layers):
        shape = plan.Shape((784, 400, 200, 100, 10)[i:], 20)
        assert layer.choice == plan.choose(shape, plan.H200, 132)
        (line,) = [line for line in text.splitlines() if line.startswith(f"{i} ")]
        assert line.split()[:5] == [str(i), f"({2 * i})", str(layer.n_in), "x", str(layer.n_out)]
        for part in (
            layer.choice.plan,
            layer.how,
            f"{layer.choice.microseconds:.1f}",
            f"{layer.launched:.1f}",
            layer.choice.limit,
        ):
            assert part in line
        assert f"layer {i}: {layer.choice.plan}, since {layer.choice.why}" in text
    assert found.layers[0].how == "9 launches a step"
    assert found.layers[0].launched == 9 * plan.H200.host_launch
    assert found.layers[1].how == "7 x 4 programs of 32 x 128 weights, float32"
    seconds = sum(layer.choice.microseconds for layer in found.layers) / 1e6
    assert found.samples_per_second == pytest.approx(20 / seconds)
    assert f"{found.samples_per_second:,.0f} samples/s, modelled" in text


def test_settings_decide_as_they_do_in_training():
    model = net(784, 100, 10, output=nn.Softmax)
    assert {layer.choice.plan for layer in dk.explain(model, 20, loss="cross_entropy").layers} == {"persistent"}
    wide = net(3072, 512, 10)

    def took(batch_size=100, **settings) -> float:
        return dk.explain(wide, batch_size, **settings).layers[0].choice.microseconds

    assert took() == took(momentum=0.9) > took(momentum=0) > took(momentum=0, precision="high")  # 0.9 where no lr is given
    assert took(500, x_dtype=torch.uint8) < took(500)
    narrow, full = (dk.explain(wide, 500, x_dtype=dtype).layers[1] for dtype in (torch.uint8, torch.float32))
    assert narrow == full  # whose input is the hidden layer's result


def test_how_short_blocks_run_is_explained(monkeypatch):
    parallel, in_turn = "3 steps in parallel, fit's default for classes,", "20 steps in turn, its default otherwise,"

    def whole(kind, blocks, batch):
        rate = batch * blocks.steps * 1e6 / (2 * blocks.microseconds)
        assert blocks.microseconds == blocks.steps * blocks.tiles.microseconds
        return (
            f"blocks of {kind} run many in a launch of {blocks.tiles.programs} programs, {blocks.microseconds:.0f} us each: "
            f"{rate:,.0f} samples/s, modelled"
        )

    def replayed(kind, blocks, batch, layers, alone):
        rate = batch * blocks.steps * 1e6 / (len(layers) * blocks.microseconds)
        mean = sum(layer.choice.microseconds for layer in layers) / len(layers)
        assert blocks.microseconds == pytest.approx(blocks.steps * mean + blocks.beside)
        assert blocks.beside > alone
        return (
            f"blocks of {kind} are replayed from CUDA graphs, {blocks.microseconds:.0f} us each, {blocks.beside:.0f} us of it "
            f"beside the steps: {rate:,.0f} samples/s, modelled"
        )

    found = dk.explain(net(784, 100, 10), 20)
    assert whole(parallel, found.parallel, 20) in str(found)
    assert replayed(in_turn, found.in_turn, 20, found.layers, 5) in str(found)
    for other in (net(3072, 512, 10), net(784, 100, 100, 10)):
        found = dk.explain(other, 100)
        assert replayed(parallel, found.parallel, 100, found.layers, 5) in str(found)
        assert found.parallel.beside < found.in_turn.beside
    partly = net(784, 400, 200, 10)
    partly[0].requires_grad_(False)
    partly[2].requires_grad_(False)
    found, every = dk.explain(partly, 20), dk.explain(net(784, 400, 200, 10), 20)
    assert replayed(parallel, found.parallel, 20, found.layers[2:], every.parallel.beside) in str(found)
    monkeypatch.setattr(sys.modules["dante_kernels.training.explain"], "STEPS_IN_TURN", 4)
    found = dk.explain(net(784, 100, 10), 20)
    assert whole("4 steps in turn, its default otherwise,", found.in_turn, 20) in str(found)
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")
    found = dk.explain(net(784, 100, 10), 20)
    assert replayed(parallel, found.parallel, 20, found.layers, 5) in str(found)
    monkeypatch.setenv("DANTE_CUDA_GRAPHS", "0")
    slow = dk.explain(net(784, 100, 10), 20)
    assert "blocks of 4 steps in turn, its default otherwise, are launched one after the other, which Python bounds" in str(
        slow
    )
    assert slow.samples_per_second == pytest.approx(20e6 / sum(layer.launched for layer in slow.layers))
    assert slow.samples_per_second < found.samples_per_second
    monkeypatch.setenv("DANTE_CUDA_GRAPHS", "7")
    with pytest.raises(ValueError, match="DANTE_CUDA_GRAPHS: expected 0 or 1, got '7'"):
        dk.explain(net(784, 100, 10), 20)


def test_the_wanted_plan_is_explained(monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")
    assert "fused, since DANTE_GPU_PLAN names it" in str(dk.explain(net(784, 100, 10), 20))


def test_a_layer_that_cannot_have_the_wanted_plan_is_named(monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", "persistent")
    with pytest.raises(ValueError, match=r"layer 0 \(7 x 6\): DANTE_GPU_PLAN: .*: 3 layers after it > 2$"):
        dk.explain(net(7, 6, 5, 4, 3), 20)


def test_the_switch_of_torch_is_taken_and_left_alone():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert "precision high:" in str(dk.explain(net(6, 3), 2))
        assert "precision medium:" in str(dk.explain(net(6, 3), 2, precision="medium"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_frozen_layers_have_no_step():
    model = net(20, 10, 5)
    both = dk.explain(model, 5)
    model[0].requires_grad_(False)
    one = dk.explain(model, 5)
    assert one.layers[0].choice is None
    assert "frozen" in str(one)
    assert one.samples_per_second > both.samples_per_second
    model.requires_grad_(False)
    assert dk.explain(model, 5).samples_per_second is None
    assert "samples/s" not in str(dk.explain(model, 5))


def test_it_says_which_backend_really_serves(monkeypatch):
    model = net(20, 10, 5)
    monkeypatch.setenv("DANTE_BACKEND", "reference")
    assert str(dk.explain(model, 5)).endswith("on cpu the backend reference serves, which has no such plans")
    assert str(dk.explain(net(20, 10, 5).double(), 5)).endswith("no such plans; no GPU plan takes torch.float64")
    monkeypatch.setenv("DANTE_BACKEND", "triton")
    assert str(dk.explain(model, 5)).endswith("on cpu the backend triton serves, interpreted, in one program")
    with torch.device("meta"):
        huge = nn.Sequential(nn.Linear(12288, 3072), nn.ReLU(), nn.Linear(3072, 10))
    assert str(dk.explain(huge, 20)).endswith("on meta nothing can be trained, only explained")
    assert str(dk.explain(huge, 20, device="cpu")).endswith("on cpu the backend triton serves, interpreted, in one program")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number, got 2.0"),
        ({"loss": "huber"}, "loss"),
        ({"momentum": 1.0}, "momentum: expected a number from 0 to below 1, got 1.0"),
        ({"x_dtype": torch.float64}, "x_dtype: expected one of torch.float32, torch.bfloat16, torch.uint8, got torch.float64"),
        ({"precision": "full"}, "precision: expected one of highest, high, medium, got 'full'"),
        ({"device": "tpu"}, "device: expected one such as 'cpu' or 'cuda', got 'tpu'"),
        ({"model": nn.Conv2d(1, 1, 1)}, "model: expected an nn.Sequential"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"model": net(4, 3), "batch_size": 5} | change
    with pytest.raises((ValueError, TypeError), match=message):
        dk.explain(**arguments)


def test_without_triton_it_says_so():
    code = "import sys; sys.modules['triton'] = None; import dante_kernels as dk; from torch import nn"
    code += "; dk.explain(nn.Sequential(nn.Linear(2, 1)), 5)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: explain: expected triton, whose kernels the GPU plans are made of" in run.stderr
