"""`fit` trains the model's own parameters by the alternation, and keeps its promises about data, order and memory."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from support import as_bytes, assert_same, blobs, net, weights
from torch import nn

import dante_kernels as dk
from dante_kernels import kernels, losses
from dante_kernels.ops import backends


def test_it_trains_in_place_and_returns_the_history():
    x, y = blobs()
    model = net(6, 8, 3)
    parameters = list(model.parameters())
    pointers = [p.data_ptr() for p in parameters]
    history = dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=6), lr=0.2, batch_size=10, validation=(x, y))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in parameters)
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    assert history.rounds[-1].metrics["accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    assert history.rounds[-1].metrics["loss"] == pytest.approx(
        nn.functional.mse_loss(model(x), nn.functional.one_hot(y, 3).float()).item(), rel=1e-4
    )
    assert history.rounds[-1].loss < history.rounds[0].loss
    assert history.stopped_by == "rounds"
    assert len(history.rounds) == 6
    assert [b.layer for b in history.blocks] == [0, 1] * 6
    per_round = 9 * (6 * 8 + 8) + 9 * (8 * 3 + 3)
    assert [r.weights_updated for r in history.rounds] == [per_round * (i + 1) for i in range(6)]


def test_a_history_is_printed_in_a_line():
    x, y = blobs(rows=40)
    history = dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=30, inner_steps=1, inner_epochs=1), batch_size=8)
    assert f"{len(history.blocks)} blocks, 30 rounds, stopped by 'rounds'" in repr(history)
    assert len(repr(history)) < 500
    assert repr(dk.History()) == "History(0 blocks, 0 rounds, stopped by 'rounds')"


@pytest.mark.parametrize("loss", losses.CODES)
@pytest.mark.parametrize("classes", [True, False])
def test_it_equals_steps_written_by_hand(loss, classes):
    """Round-robin in float64, written plainly with autograd: the same orders, the same weights."""
    x, y = blobs(rows=25)
    x = x.double()
    target = y if classes else nn.functional.one_hot(y, 3).double() * 0.8 + 0.1 / 1.5
    model = net(6, 5, 4, 3).double()
    twin = copy.deepcopy(model)
    dk.fit(model, x, target, loss=loss, schedule=dk.RoundRobin(rounds=3), lr=[0.1, 0.2, 0.05], batch_size=10, seed=7)
    generator = torch.Generator().manual_seed(7)
    one_hot = nn.functional.one_hot(y, 3).double() if classes else target
    compute = {
        "mse": nn.functional.mse_loss,
        "cross_entropy": nn.functional.cross_entropy,
        "binary_cross_entropy": nn.functional.binary_cross_entropy_with_logits,
    }[loss]
    for round_ in range(3):
        factor = (1 + math.cos(math.pi * round_ / 3)) / 2
        for layer, lr in ((twin[0], 0.1), (twin[2], 0.2), (twin[4], 0.05)):
            order = torch.randperm(25, generator=generator)
            for start in range(0, 25, 10):
                rows = order[start : start + 10]
                gradients = torch.autograd.grad(compute(twin(x[rows]), one_hot[rows]), list(layer.parameters()))
                norm = torch.cat([g.flatten() for g in gradients]).norm()
                with torch.no_grad():
                    for p, g in zip(layer.parameters(), gradients, strict=True):
                        p -= factor * lr * g / norm
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-9, atol=1e-12)


def test_alternating_trains_the_outer_layer_first():
    x, y = blobs()
    history = dk.fit(net(6, 5, 3), x, y, schedule=dk.Alternating(rounds=2, inner_epochs=1), batch_size=30)
    assert [b.layer for b in history.blocks] == [1, 0, 1, 0]
    assert [b.name for b in history.blocks] == ["2", "0", "2", "0"]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (dk.RoundRobin(rounds=1), [9]),
        (dk.RoundRobin(rounds=1, inner_epochs=5), [45]),
        (dk.RoundRobin(rounds=1, inner_epochs=0.5), [4]),
        (dk.RoundRobin(rounds=1, inner_epochs=0.001), [1]),
        (dk.RoundRobin(rounds=1, inner_steps=20), [20]),
        (dk.RoundRobin(rounds=1, inner_epochs=1, inner_steps=4), [4, 4, 1]),
        (dk.RoundRobin(rounds=1, inner_epochs=2, inner_steps=100), [18]),
    ],
)
def test_blocks_are_as_long_as_the_schedule_says(schedule, steps):
    x, y = blobs()
    history = dk.fit(net(6, 5, 3), x, y, schedule=schedule, batch_size=10)
    assert [b.steps for b in history.blocks if b.layer == 0] == steps
    assert [b.layer for b in history.blocks] == [0, 1] * len(steps)
    assert history.rounds[0].steps == 2 * sum(steps)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_layer_goes_on_through_the_data_where_its_last_block_stopped(shuffle, monkeypatch):
    """Whatever the blocks' length, a layer visits every row once a pass, and short last batches end a pass."""
    seen = []
    real = dk.ops.sngd_epoch_

    def spy(weight, bias, x, target, order, batch_size, suffix, *rest, **more):
        if not suffix:
            rows = target[:, 0] if order is None else target[order][:, 0]
            seen.extend(rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size))
        return real(weight, bias, x, target, order, batch_size, suffix, *rest, **more)

    monkeypatch.setattr(dk.ops, "sngd_epoch_", spy)
    x = torch.randn(23, 4)
    y = torch.arange(23.0)[:, None]
    dk.fit(net(4, 3, 1), x, y, schedule=dk.RoundRobin(rounds=4, inner_steps=3), batch_size=5, shuffle=shuffle, lr=0.01)
    assert [len(batch) for batch in seen] == [5, 5, 5, 5, 3, 5, 5, 5, 5, 3, 5, 5]
    first, second = ([row for batch in part for row in batch] for part in (seen[:5], seen[5:10]))
    assert sorted(first) == sorted(second) == list(range(23))
    if shuffle:
        assert first != second
        assert first != list(range(23))
    else:
        assert first == second == list(range(23))


@pytest.mark.parametrize("schedule", [dk.RoundRobin(rounds=2), dk.RoundRobin(rounds=2, inner_epochs=1, inner_steps=2)])
def test_kept_and_recomputed_prefix_give_the_same_bits(backend, schedule):
    x, y = blobs(rows=47)
    outcomes = []
    for budget in (2**30, 1000, 0):
        model = net(6, 9, 7, 3)
        dk.fit(model, x, y, schedule=schedule, batch_size=10, backend=backend, prefix_budget=budget, momentum=0.5)
        outcomes.append(weights(model))
    if backend == "reference":  # torch's own products may depend on the number of rows
        torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outcomes[0], outcomes[2], rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(outcomes[0], outcomes[1])
        assert torch.equal(outcomes[0], outcomes[2])


def test_backends_train_alike(backend):
    x, y = blobs(rows=40)
    reference, model = net(6, 5, 3), net(6, 5, 3)
    for m, kind in ((reference, "reference"), (model, backend)):
        dk.fit(m, x, y, schedule=dk.RoundRobin(rounds=2), batch_size=10, backend=kind)
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_seed_gives_one_result_and_another_another(backend, momentum):
    x, y = blobs(rows=40)
    outcomes = []
    for seed in (3, 3, 4):
        model = net(6, 5, 3)
        dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=2), batch_size=10, seed=seed, momentum=momentum, backend=backend)
        outcomes.append(weights(model))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_shuffling_leaves_torchs_global_generator_alone():
    x, y = blobs()
    before = torch.random.get_rng_state()
    dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("lr_schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("cosine", [(1 + math.cos(math.pi * r / 4)) / 2 for r in range(4)]),
        (lambda r, rounds: 1 - r / rounds, [1, 0.75, 0.5, 0.25]),
    ],
)
def test_the_rate_follows_its_schedule(lr_schedule, factors):
    x, y = blobs()
    history = dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=4), lr=[0.1, 0.2], lr_schedule=lr_schedule)
    assert [b.lr for b in history.blocks] == pytest.approx([lr * f for f in factors for lr in (0.1, 0.2)], rel=1e-6)


def test_the_rate_may_be_a_callable_of_the_round():
    x, y = blobs()
    history = dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=3), lr=lambda r: 0.1 / (r + 1), lr_schedule="constant")
    assert [b.lr for b in history.blocks if b.layer == 0] == pytest.approx([0.1, 0.05, 0.1 / 3], rel=1e-6)


def test_a_relative_rate_is_a_part_of_the_layers_own_norm():
    x, y = blobs()
    model = net(6, 5, 3)
    expected = [0.01 * torch.cat([m.weight.flatten(), m.bias]).norm().item() for m in (model[0], model[2])]
    history = dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=1), lr=0.01, relative_lr=True, lr_schedule="constant")
    assert [b.lr for b in history.blocks] == pytest.approx(expected, rel=1e-5)


def test_velocity_is_kept_from_block_to_block_unless_reset():
    x, y = blobs()
    outcomes = []
    for reset in (False, True):
        model = net(6, 5, 3)
        dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=3, inner_steps=2), momentum=0.9, reset_momentum=reset, batch_size=10)
        outcomes.append(weights(model))
    assert not torch.equal(*outcomes)
    one_block = []
    for reset in (False, True):
        model = net(6, 5, 3)
        dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=1), momentum=0.9, reset_momentum=reset, batch_size=10)
        one_block.append(weights(model))
    assert torch.equal(*one_block)


def test_nesterov_is_another_direction_than_heavy_ball():
    x, y = blobs()
    outcomes = []
    for direction in ("sngd", "nesterov"):
        model = net(6, 5, 3)
        dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=2), momentum=0.9, direction=direction, batch_size=10)
        outcomes.append(weights(model))
    assert not torch.equal(*outcomes)


def test_frozen_layers_stay_as_they_are():
    x, y = blobs()
    model = net(6, 5, 4, 3)
    for p in model[2].parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(model[2].state_dict())
    history = dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=2, finetune_epochs=1), batch_size=10)
    assert all(torch.equal(before[k], v) for k, v in model[2].state_dict().items())
    assert {b.layer for b in history.blocks} == {0, 2}
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="model: no layer has parameters that require gradients"):
        dk.fit(model, x, y)


def test_binary_targets_of_one_output_may_be_classes_or_values():
    x, y = blobs(classes=2)
    outcomes = []
    for target in (y, y.float(), y.float()[:, None], y.numpy()):
        model = net(6, 5, 1)
        history = dk.fit(
            model,
            x,
            target,
            loss="binary_cross_entropy",
            schedule=dk.RoundRobin(rounds=4),
            lr=0.1,
            batch_size=10,
            validation=(x, y),
        )
        outcomes.append(weights(model))
        assert history.rounds[-1].metrics["accuracy"] > 0.9
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def test_the_middle_between_two_classes_is_0_for_logits_and_one_half_for_values():
    """Outputs of 0.2 for both classes: a logit above 0 means class 1, a value below 1/2 class 0."""
    x, y = torch.ones(4, 1), torch.tensor([0, 1, 1, 1])
    for loss, accuracy in (("binary_cross_entropy", 0.75), ("mse", 0.25)):
        model = nn.Sequential(nn.Linear(1, 1, bias=False))
        nn.init.constant_(model[0].weight, 0.2)
        history = dk.fit(model, x, y, loss=loss, schedule=dk.RoundRobin(rounds=1), lr=1e-6, validation=(x, y))
        assert history.rounds[0].metrics["accuracy"] == accuracy


def test_steps_that_change_nothing_update_no_weights():
    x, y = blobs(rows=40)
    x[10:20] = 0  # with no bias, a batch of zeros has no gradient
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    history = dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=1), batch_size=10, shuffle=False)
    assert history.blocks[0].skipped == 1
    assert history.weights_updated == 3 * 18


def test_evaluation_and_prefix_go_through_the_rows_in_pieces(monkeypatch):
    from dante_kernels.training import problem

    x, y = blobs(rows=47)
    outcomes = []
    for rows in (8192, 10):
        monkeypatch.setattr(problem, "FORWARD_ROWS", rows)
        model = net(6, 5, 4, 3)
        history = dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=2), batch_size=10, validation=(x, y))
        outcomes.append((weights(model), history.rounds[-1].metrics))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-4, atol=1e-5)
    assert outcomes[0][1]["loss"] == pytest.approx(outcomes[1][1]["loss"], rel=1e-5)
    assert outcomes[0][1]["accuracy"] == outcomes[1][1]["accuracy"]


def test_a_final_softmax_is_not_applied_twice():
    x, y = blobs()
    plain, softmax = net(6, 5, 3), net(6, 5, 3, output=lambda: nn.Softmax(dim=1))
    for model in (plain, softmax):
        dk.fit(model, x, y, loss="cross_entropy", schedule=dk.RoundRobin(rounds=2), batch_size=10)
    assert torch.equal(weights(plain), weights(softmax))


def test_images_are_flattened_where_the_model_starts_so():
    x, y = blobs()
    flat, images = net(6, 5, 3), nn.Sequential(nn.Flatten(), *net(6, 5, 3))
    dk.fit(flat, x, y, schedule=dk.RoundRobin(rounds=1))
    dk.fit(images, x.reshape(-1, 1, 2, 3), y, schedule=dk.RoundRobin(rounds=1))
    assert torch.equal(weights(flat), weights(images))


def test_bfloat16_data_is_taken_beside_float32_weights():
    x, y = blobs()
    model = net(6, 8, 3)
    dk.fit(model, x.bfloat16(), y, schedule=dk.RoundRobin(rounds=6), lr=0.2, batch_size=10)
    assert next(model.parameters()).dtype == torch.float32
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    autoencoder = net(6, 4, 6)
    dk.fit(autoencoder, x.bfloat16(), schedule=dk.RoundRobin(rounds=1))


@pytest.mark.parametrize(
    "more",
    [
        {"schedule": dk.RoundRobin(rounds=2, finetune_epochs=2)},
        {"schedule": dk.RoundRobin(rounds=2, inner_steps=3), "prefix_budget": 0, "momentum": 0.9, "stop_epsilon": 1e-9},
        {"schedule": dk.Alternating(rounds=2), "loss": "cross_entropy", "shuffle": False},
    ],
)
def test_uint8_data_trains_as_the_float32_values_that_they_stand_for(backend, more, monkeypatch):
    x, y = blobs()
    narrow, wide = as_bytes(x)
    seen, real = [], dk.ops.sngd_epoch_

    def spy(weight, bias, x, *rest, **settings):
        seen.append((weight.shape[1], x.dtype, x.untyped_storage().data_ptr()))
        return real(weight, bias, x, *rest, **settings)

    monkeypatch.setattr(dk.ops, "sngd_epoch_", spy)
    models, histories = (net(6, 5, 3), net(6, 5, 3)), []
    for model, data, scale in zip(models, (narrow, wide), ({"x_scale": 1 / 255}, {}), strict=True):
        seen.clear()
        settings = {"validation": (data[:50], y[:50].to(torch.uint8)), "backend": backend, "batch_size": 20, **scale, **more}
        histories.append(dk.fit(model, data, y.to(torch.uint8), **settings))
        first = (data.dtype, data.untyped_storage().data_ptr())
        # Two layers may take one launch for both, which is no pass.
        assert {(dtype, place) for n_in, dtype, place in seen if n_in == 6} == ({first} if seen else set())
    assert_same(backend, *map(weights, models))
    for ours, theirs in zip(histories[0].rounds, histories[1].rounds, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.objective == (None if theirs.objective is None else pytest.approx(theirs.objective, rel=1e-5))
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5)


MEMORY = """
import resource, sys, tempfile
import torch
from torch import nn
import dante_kernels as dk
x, y = torch.randint(0, 256, (200_000, 400), dtype=torch.uint8), torch.randint(0, 4, (200_000,))
model = nn.Sequential(nn.Linear(400, 4), nn.ReLU(), nn.Linear(4, 4))
schedule = dk.RoundRobin(rounds=1, finetune_epochs=1)

def fit(rows, folder):
    data = (x[:rows], y[:rows])
    dk.fit(model, *data, schedule=schedule, x_scale=1 / 255, batch_size=1000, validation=data, stop_epsilon=1e-9,
           checkpoint=folder + f"/{rows}")

with tempfile.TemporaryDirectory() as folder:
    fit(1, folder)  # code and libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit(len(x), folder)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux gives it")
def test_no_wider_copy_is_made_of_uint8_data():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) * 1024 < 200_000 * 400  # as much as a copy in uint8


def test_callbacks_see_every_round_and_can_stop():
    x, y = blobs()
    seen = []

    def callback(history):
        seen.append(len(history.rounds))
        return len(history.rounds) == 3

    history = dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=9, finetune_epochs=2), callbacks=[callback])
    assert seen == [1, 2, 3]
    assert history.stopped_by == "callback"


def test_progress_goes_to_stderr(capsys):
    x, y = blobs()
    dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=2), progress=True, validation=(x, y))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 2
    assert "accuracy" in printed.err


def test_precision_holds_during_the_call_only():
    x, y = blobs()
    seen = []
    before = torch.get_float32_matmul_precision()
    dk.fit(
        net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=1), precision="high",
        callbacks=[lambda _: seen.append(torch.get_float32_matmul_precision())],
    )  # fmt: skip
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before


def test_every_usable_backend_is_reported():
    assert backends.availability()["reference"] is None


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"momentum": 0.9, "relative_lr": True, "lr": 0.02},
        {"momentum": 0.9, "reset_momentum": True, "direction": "nesterov", "shuffle": False},
    ],
    ids=["plain", "relative", "reset"],
)
def test_a_round_of_short_blocks_in_one_launch_is_that_of_the_reference(how, monkeypatch):
    launched = []
    run = kernels.sngd_blocks_
    monkeypatch.setattr(kernels, "sngd_blocks_", lambda *a: launched.append(1) or run(*a))
    x, y = blobs(rows=50)
    settings = {"schedule": dk.RoundRobin(rounds=2, inner_epochs=1, inner_steps=2), "batch_size": 8, "seed": 3} | how
    models = [net(6, 5, 3) for _ in range(2)]
    histories = [dk.fit(m, x, y, backend=b, **settings) for m, b in zip(models, ("reference", "triton"), strict=True)]
    assert launched == [1, 1]
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-4, atol=1e-5)
    for record, other in zip(*(history.blocks for history in histories), strict=True):
        assert (record.layer, record.steps) == (other.layer, other.steps)
        assert other.lr == pytest.approx(record.lr, rel=1e-5)
        assert other.loss == pytest.approx(record.loss, rel=1e-4)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
def test_a_step_in_one_launch_that_is_not_finite_is_named_and_undone():
    x, y = blobs(rows=40)
    x[30] = float("nan")
    settings = {"schedule": dk.RoundRobin(rounds=1, inner_epochs=1, inner_steps=2), "batch_size": 8, "shuffle": False}
    models = [net(6, 5, 3) for _ in range(2)]
    for model, backend in zip(models, ("reference", "triton"), strict=True):
        with pytest.raises(dk.NonFiniteError, match=r"layer 0 \('0'\), round 0, step 1 of its block 2"):
            dk.fit(model, x, y, backend=backend, **settings)
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-5, atol=1e-6)


def test_seconds_on_a_gpu_are_asked_for_when_the_device_has_come_to_them(monkeypatch):
    from dante_kernels.training import trainer

    class Event:
        recorded = reached = False

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.recorded = True

        def synchronize(self):
            self.reached = self.recorded

        def elapsed_time(self, last):
            assert last.reached, "torch raises here"
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "its stream")
    assert trainer._stopwatch(torch.device("cuda"))()() == 2.5
