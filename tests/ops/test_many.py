"""`sngd_epochs_` gives every layer what `sngd_epoch_` would, and the backend the calls of one kind together."""

import pytest
import torch
from support import make_problem
from torch import nn

from dante_kernels import ops
from dante_kernels.ops import backends, many


def call(seed, *, lr=0.1, batch_size=3, momentum=0.0, order=True, **kind):
    """The arguments of a pass over a problem of its own."""
    p = make_problem(seed=seed, class_indices=False, **kind)
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": p.weight,
        "bias": p.bias,
        "x": p.x,
        "target": p.target,
        "order": torch.randperm(len(p.x), generator=generator) if order else None,
        "batch_size": batch_size,
        "suffix": p.suffix,
        "activation": p.activation,
        "loss": p.loss,
        "lr": lr,
        "velocity_weight": torch.zeros_like(p.weight) if momentum else None,
        "velocity_bias": torch.zeros_like(p.bias) if momentum and p.bias is not None else None,
        "momentum": momentum,
    }


KINDS = [{}, {"lr": 0.3}, {"momentum": 0.9}, {"order": False}, {"batch_size": 4}, {"widths": (3,)}, {"loss": "cross_entropy"}]


def changed(one):
    return [one[name] for name in ("weight", "bias", "velocity_weight", "velocity_bias") if one[name] is not None]


def test_each_call_has_the_bits_of_its_own_operator(backend):
    def make():
        return [call(seed, **kind) for seed in range(2) for kind in KINDS]

    alone, together = make(), make()
    expected = [ops.sngd_epoch_(**one, backend=backend) for one in alone]
    got = ops.sngd_epochs_([dict(one, backend=backend) for one in together])
    for result, wanted, one, other in zip(got, expected, together, alone, strict=True):
        assert all(map(torch.equal, (*result, *changed(one)), (*wanted, *changed(other))))


def test_calls_of_one_kind_go_to_the_backend_together(monkeypatch):
    groups = []

    def together(calls):
        groups.append([(len(args), float(args[10])) for args in calls])  # lr is the eleventh argument of the schema
        return [backends._Reference.sngd_epoch_(*args) for args in calls]

    monkeypatch.setattr(backends._Reference, "sngd_epochs_", staticmethod(together), raising=False)
    calls = [call(0), call(1, batch_size=2), call(2, lr=0.5), call(3, momentum=0.5), call(4, lr=0.25), call(5, momentum=0.5)]
    calls[4]["x"] = calls[4]["x"].double().float()
    expected = [dict(one, **{k: v.clone() for k, v in one.items() if isinstance(v, torch.Tensor)}) for one in calls]
    got = ops.sngd_epochs_([dict(one, backend="reference") for one in calls])
    lrs = [[round(lr, 3) for _, lr in group] for group in groups]
    assert lrs == [[0.1, 0.5, 0.25], [0.1, 0.1]]  # the second call, of another mini-batch, is alone
    for one, other, result in zip(calls, expected, got, strict=True):
        assert all(map(torch.equal, result, ops.sngd_epoch_(**other, backend="reference")))
        assert torch.equal(one["weight"], other["weight"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x: torch.stack([x, x], dim=2)[:, :, 0]),
        ("x", lambda x: x.bfloat16()),
        ("x", lambda x: torch.cat([x, x])),
        ("order", lambda order: order[:-1]),
        ("activation", lambda _: "sigmoid"),
        ("bias", lambda _: None),
        ("suffix", lambda layers: [(layers[0].weight, None, layers[0].activation)]),
        ("nesterov", lambda _: True),
    ],
)
def test_another_layout_or_rule_is_another_kind(name, change, monkeypatch):
    sizes = []

    def together(calls):
        sizes.append(len(calls))
        return [backends._Reference.sngd_epoch_(*args) for args in calls]

    monkeypatch.setattr(backends._Reference, "sngd_epochs_", staticmethod(together), raising=False)
    calls = [dict(call(seed, momentum=0.5), nesterov=False, backend="reference") for seed in range(3)]
    calls[1][name] = change(calls[1][name])
    if name == "bias":
        calls[1]["velocity_bias"] = None
    if name == "x":
        calls[1]["target"] = calls[1]["target"].repeat(len(calls[1]["x"]) // 7, 1)
    ops.sngd_epochs_(calls)
    assert sizes == [2]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda calls: calls[2].update(lr="fast"), TypeError, r"calls\[2\]: lr: expected a number"),
        (lambda calls: calls[2].update(backend="abacus"), ValueError, r"calls\[2\]: backend: expected auto or one of"),
        (lambda calls: calls[2].update(rate=1), TypeError, r"calls\[2\]: expected sngd_epoch_'s arguments by name, got rate"),
        (lambda calls: calls[2].pop("weight"), TypeError, r"calls\[2\]: expected .* by name, got no weight"),
        (lambda calls: calls.__setitem__(2, 3), TypeError, r"calls\[2\]: expected a mapping of .*, got int"),
        (lambda calls: calls[2].update(batch_size=0), ValueError, r"calls\[2\]: batch_size: expected at least 1, got 0"),
        (lambda calls: calls[2].update(weight=calls[0]["weight"]), ValueError, r"calls\[\d\] weight: is changed in place, but"),
        (lambda calls: calls[0].update(suffix=[(calls[2]["bias"][:, None].T, None, "relu")], target=torch.zeros(7, 1)),
         ValueError, r"calls\[2\] bias: is changed in place, but shares"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_named_and_none_is_run(spoil, error, message):
    calls = [call(seed) for seed in range(3)]
    before = [[t.clone() for t in changed(one)] for one in calls]
    tensors = [changed(one) for one in calls]
    spoil(calls)
    with pytest.raises(error, match=message):
        ops.sngd_epochs_(calls)
    assert all(torch.equal(t, b) for ts, bs in zip(tensors, before, strict=True) for t, b in zip(ts, bs, strict=True))


def test_data_may_be_shared_and_autograd_sees_the_change():
    calls = [call(seed) for seed in range(2)]
    calls[1].update({name: calls[0][name] for name in ("x", "target", "order", "suffix")})
    layer = nn.Linear(5, 6)
    calls[0]["weight"] = layer.weight
    loss = (layer(calls[0]["x"].requires_grad_()) ** 2).sum()
    ops.sngd_epochs_(calls)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_calls_are_no_results():
    assert ops.sngd_epochs_([]) == []


def test_a_call_that_its_backend_cannot_serve_is_the_only_one_that_fails(monkeypatch):
    calls, epoch = [call(seed) for seed in range(3)], backends._Reference.sngd_epoch_
    expected = [{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in one.items()} for one in calls]

    def serve(*arguments):
        if arguments[0] is calls[1]["weight"]:
            raise RuntimeError("no memory")
        return epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(backends._Reference, "sngd_epoch_", staticmethod(serve))
        first, error, last = many.outcomes([dict(one, backend="reference") for one in calls])
    assert str(error) == "no memory"
    for i, got in ((0, first), (2, last)):
        assert all(map(torch.equal, got, ops.sngd_epoch_(**expected[i], backend="reference")))
        assert torch.equal(calls[i]["weight"], expected[i]["weight"])
    assert torch.equal(calls[1]["weight"], expected[1]["weight"])
