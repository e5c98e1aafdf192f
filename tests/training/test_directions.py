"""Directions by torch's optimizers: each is the plain method on one layer at a time, and keeps what `fit` promises of SNGD."""

import copy
import math

import pytest
import torch
from support import as_bytes, assert_same, blobs, net, weights
from torch import nn

import dante_kernels as dk
from dante_kernels.training import directions

X, Y = blobs(rows=25)
WHOLE = dk.RoundRobin(rounds=2)
SHORT = dk.RoundRobin(rounds=4, inner_steps=2)  # a pass has three mini-batches, so blocks go over its end
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, 0.1),
    "momentum": (torch.optim.SGD, 0.02),
    "adam": (torch.optim.Adam, 0.01),
    "adagrad": (torch.optim.Adagrad, 0.05),
    "rmsprop": (torch.optim.RMSprop, 0.01),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def settings_of(name, **more):
    """What `fit` takes for one of OPTIMIZERS."""
    momentum = {"direction": "sgd", "momentum": 0.9} if name == "momentum" else {"direction": name}
    return {"lr": OPTIMIZERS[name][1], "batch_size": 10, "seed": 7, **momentum} | more


def batches(generator):
    """Rows of one layer's mini-batches, pass after pass."""
    while True:
        yield from torch.randperm(25, generator=generator).split(10)


def by_hand(model, name, schedule, reset=False, relative=False):
    """The alternation by autograd of the whole chain and torch's own optimizer on one layer; block by block (losses, norms)."""
    kind, lr = OPTIMIZERS[name]
    target = nn.functional.one_hot(Y, 3).double()
    generator = torch.Generator().manual_seed(7)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    streams = [batches(generator) for _ in layers]

    def fresh(layer):
        return kind(layer.parameters(), lr=lr, foreach=False, **({"momentum": 0.9} if name == "momentum" else {}))

    optimizers = [fresh(layer) for layer in layers]
    for round_ in range(schedule.rounds):
        for i, layer in enumerate(layers):
            if reset:
                optimizers[i] = fresh(layer)
            (group,) = optimizers[i].param_groups
            group["lr"] = lr * (1 + math.cos(math.pi * round_ / schedule.rounds)) / 2
            if relative:
                group["lr"] *= nn.utils.parameters_to_vector(layer.parameters()).norm().item()
            losses, norms = [], []
            for _ in range(schedule.inner_steps or 3):
                rows = next(streams[i])
                model.zero_grad()
                loss = nn.functional.mse_loss(model(X[rows].double()), target[rows])
                loss.backward()
                losses.append(loss.item())
                norms.append(torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item())
                optimizers[i].step()
            yield losses, norms


@every_optimizer
@pytest.mark.parametrize("schedule", [WHOLE, SHORT])
@pytest.mark.parametrize("more", [{}, {"reset_momentum": True}, {"relative_lr": True}, {"prefix_budget": 0}], ids=str)
def test_it_is_torchs_optimizer_on_one_layer_at_a_time(name, schedule, more):
    model = net(6, 5, 4, 3).double()
    twin = copy.deepcopy(model)
    history = dk.fit(model, X.double(), Y, schedule=schedule, **settings_of(name, **more))
    steps = list(by_hand(twin, name, schedule, more.get("reset_momentum", False), more.get("relative_lr", False)))
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-9, atol=1e-12)
    for block, (losses, norms) in zip(history.blocks, steps, strict=True):
        assert block.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
        assert (block.norm_min, block.norm_max) == pytest.approx((min(norms), max(norms)), rel=1e-9)
        assert block.norm_mean == pytest.approx(sum(norms) / len(norms), rel=1e-9)
        assert (block.steps, block.skipped) == (len(norms), 0)


@every_optimizer
def test_backends_follow_the_plain_method(backend, name):
    model = net(6, 5, 4, 3)
    twin = copy.deepcopy(model).double()
    dk.fit(model, X, Y, schedule=SHORT, backend=backend, **settings_of(name))
    for _ in by_hand(twin, name, SHORT):
        pass
    torch.testing.assert_close(weights(model).double(), weights(twin), rtol=1e-3, atol=1e-4)


@every_optimizer
def test_uint8_and_bfloat16_data_stand_for_their_values(backend, name):
    narrow, wide = as_bytes(X)
    for data, values, scale in ((narrow, wide, {"x_scale": 1 / 255}), (X.bfloat16(), X.bfloat16().float(), {})):
        models = net(6, 4, 3), net(6, 4, 3)
        ours = dk.fit(models[0], data, Y, schedule=SHORT, backend=backend, **settings_of(name, **scale))
        theirs = dk.fit(models[1], values, Y, schedule=SHORT, backend=backend, **settings_of(name))
        assert_same(backend, *map(weights, models))
        assert [b.loss for b in ours.blocks] == pytest.approx([b.loss for b in theirs.blocks], rel=1e-5)


@every_optimizer
def test_layers_without_bias_frozen_ones_and_transposed_weights_are_trained_where_they_lie(name):
    def build():
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        model.load_state_dict({k: v for k, v in net(6, 5, 4, 3).state_dict().items() if k != "0.bias"})
        return model.requires_grad_(True)

    plain, transposed = build(), build()
    storages = {}
    for layer in (transposed[0], transposed[2], transposed[4]):
        storage = torch.full((layer.in_features, 2 * layer.out_features), 77.0)
        storage[:, ::2] = layer.weight.detach().t()
        layer.weight = nn.Parameter(storage[:, ::2].t())
        storages[layer] = storage
    for model in (plain, transposed):
        model[2].requires_grad_(False)
        before = copy.deepcopy(model[2])
        dk.fit(model, X, Y, schedule=SHORT, **settings_of(name))
        assert torch.equal(model[2].weight, before.weight)
        assert torch.equal(model[2].bias, before.bias)
    torch.testing.assert_close(weights(transposed), weights(plain), rtol=1e-5, atol=1e-6)
    for layer, storage in storages.items():
        assert torch.equal(storage[:, ::2].t(), layer.weight)
        assert bool((storage[:, 1::2] == 77.0).all())


@every_optimizer
def test_a_step_with_a_zero_gradient_changes_nothing_unless_the_method_goes_on_by_itself(name):
    x = X[:20].clone()
    x[10:] = 0  # with no bias, a batch of zeros has no gradient
    outcomes = []
    for steps in (1, 2):
        model = net(6, 3)
        model[0].bias = None
        schedule = dk.RoundRobin(rounds=1, inner_steps=steps)
        history = dk.fit(model, x, Y[:20], schedule=schedule, shuffle=False, **settings_of(name))
        outcomes.append(weights(model))
    goes_on = name in ("momentum", "adam")
    assert torch.equal(*outcomes) == (not goes_on)
    assert history.blocks[0].norm_min == 0
    assert history.blocks[0].skipped == (0 if goes_on else 1)
    assert history.weights_updated == 18 * (2 if goes_on else 1)


@every_optimizer
@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, name, after):
    common = settings_of(name, schedule=SHORT)
    whole = net(6, 5, 4, 3)
    expected = dk.fit(whole, X, Y, **common)

    def interrupt(history):
        if len(history.rounds) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dk.fit(net(6, 5, 4, 3), X, Y, checkpoint=tmp_path / "run.pt", callbacks=[interrupt], **common)
    model = net(6, 5, 4, 3, seed=99 if after > 1 else 0)  # a callback comes before its round's checkpoint
    history = dk.fit(model, X, Y, checkpoint=tmp_path / "run.pt", **common)
    assert torch.equal(weights(model), weights(whole))
    assert [r.loss for r in history.rounds] == [r.loss for r in expected.rounds]


def test_a_checkpoint_of_another_direction_is_refused(tmp_path):
    common = {"schedule": WHOLE, "lr": 0.01, "checkpoint": tmp_path / "run.pt"}
    dk.fit(net(6, 5, 3), X, Y, direction="adagrad", **common)
    with pytest.raises(ValueError, match="belongs to another run, which differs in direction;"):
        dk.fit(net(6, 5, 3), X, Y, direction="rmsprop", **common)


@every_optimizer
def test_a_gradient_that_is_not_finite_is_named_and_the_weights_are_those_before_it(backend, name):
    """Row 17 is spoilt between two rounds: it is met in the second step of a pass, the last layer's fifth of all."""
    common = settings_of(name, shuffle=False, lr_schedule="constant", backend=backend)
    models = net(6, 5, 3), net(6, 5, 3)
    for model in models:
        model[0].requires_grad_(False)
    x = X.clone()

    def spoil(history):
        if len(history.rounds) == 1:
            x[17, 0] = float("nan")

    with pytest.raises(dk.NonFiniteError, match=r"layer 1 \('2'\), round 1, step 1 of its block 0: the gradient's norm is nan"):
        dk.fit(models[0], x, Y, schedule=dk.RoundRobin(rounds=3), callbacks=[spoil], **common)
    dk.fit(models[1], X, Y, schedule=dk.RoundRobin(rounds=1, inner_steps=4), **common)
    assert_same(backend, *map(weights, models))


@pytest.mark.parametrize("backend", ["cpp", "reference", "triton"])
def test_models_side_by_side_have_the_bits_of_each_alone(backend):
    names = [*OPTIMIZERS, "nesterov"]
    settings = {
        "direction": [*(settings_of(name)["direction"] for name in OPTIMIZERS), "nesterov"],
        "momentum": [0.9 if name in ("momentum", "nesterov") else 0.0 for name in names],
        "schedule": dk.RoundRobin(rounds=2, inner_steps=2), "lr": 0.02, "batch_size": 10, "backend": backend,
    }  # fmt: skip
    models = [net(6, 4, 3, seed=i) for i in range(len(names))]
    twins = copy.deepcopy(models)
    histories = dk.fit_many(models, X, Y, **settings)
    for i, (model, twin, history) in enumerate(zip(models, twins, histories, strict=True)):
        own = {name: value[i] if isinstance(value, list) else value for name, value in settings.items()}
        alone = dk.fit(twin, X, Y, **own)
        assert torch.equal(weights(model), weights(twin)), names[i]
        assert [b.loss for b in history.blocks] == [b.loss for b in alone.blocks]


@every_optimizer
@pytest.mark.parametrize("width", [120, 131])
def test_bits_do_not_depend_on_the_number_of_threads(name, width):
    """A layer and a mini-batch so large that torch would share the work."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5000, 307, generator=generator), torch.randint(0, 10, (5000,), generator=generator)
    settings = settings_of(name, backend="cpp", schedule=dk.RoundRobin(rounds=2, inner_steps=2), batch_size=4000)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = net(307, width, 10)
            history = dk.fit(model, x, y, **settings)
            outcomes.append((weights(model), [block.loss for block in history.blocks]))
    finally:
        torch.set_num_threads(before)
    for vector, losses in outcomes[1:]:
        assert torch.equal(vector, outcomes[0][0])
        assert losses == outcomes[0][1]


@every_optimizer
def test_no_step_waits_for_the_device(name, monkeypatch):
    """On a CPU nothing waits, but what would wait on a GPU can be seen: a tensor's value asked for in Python."""
    settings = settings_of(name)
    weight, lr = torch.randn(3, 6), torch.tensor(0.1)
    rule = directions.Rule(settings["direction"], settings.get("momentum", 0.0), [weight])
    asked = []
    for method in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy"):
        real = getattr(torch.Tensor, method)

        def note(self, *args, _real=real, _method=method):
            asked.append((_method, self.data_ptr()))
            return _real(self, *args)

        monkeypatch.setattr(torch.Tensor, method, note)
    rule.epoch_(
        weight=weight, bias=None, x=X, target=Y, order=None, batch_size=10, suffix=[], activation="tanh", loss="mse", lr=lr,
        x_scale=1.0, backend="reference",
    )  # fmt: skip
    assert asked == [("item", lr.data_ptr())]  # once a pass, and only where lr lies on the CPU


def test_it_learns():
    x, y = blobs()
    for name in OPTIMIZERS:
        model = net(6, 8, 3)
        dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=12), **settings_of(name))
        assert (model(x).argmax(1) == y).double().mean() > 0.9, name


@pytest.mark.parametrize("direction", directions.WITHOUT_MOMENTUM)
def test_momentum_beside_a_direction_without_it_is_refused(direction):
    model = net(6, 5, 3)
    before = weights(model)
    with pytest.raises(ValueError, match=f"momentum: expected 0 with direction='{direction}', got 0.9"):
        dk.fit(model, X, Y, direction=direction, lr=0.01, momentum=0.9)
    assert torch.equal(weights(model), before)


def test_adagrad_steps_alike_where_torch_has_no_fused_one(monkeypatch):
    models = net(6, 5, 3), net(6, 5, 3)
    dk.fit(models[0], X, Y, schedule=SHORT, **settings_of("adagrad"))
    fused = []
    real = torch._fused_adagrad_
    monkeypatch.setattr(torch, "_fused_adagrad_", lambda *args, **more: fused.append(1) or real(*args, **more))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    dk.fit(models[1], X, Y, schedule=SHORT, **settings_of("adagrad"))
    assert not fused
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-4, atol=1e-5)
