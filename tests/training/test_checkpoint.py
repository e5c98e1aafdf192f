"""A checkpoint continues a run as if it had never been interrupted, and never harms what is there."""

import pytest
import torch
from support import as_bytes, blobs, net, weights
from torch import nn

import dante_kernels as dk

SCHEDULES = {
    "round-robin": (dk.RoundRobin(rounds=4, inner_epochs=1, inner_steps=4, finetune_epochs=2), (6, 5, 4, 3)),
    "uint8": (dk.RoundRobin(rounds=4, inner_epochs=1, inner_steps=4, finetune_epochs=2), (6, 5, 4, 3)),
    "stacked": (dk.StackedAutoencoder(rounds=2, finetune_epochs=1), (6, 5, 4, 5, 6)),
}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, kind, after):
    schedule, widths = SCHEDULES[kind]
    x, y = blobs()
    data = (x,) if kind == "stacked" else (x, y)
    common = {"schedule": schedule, "batch_size": 7, "momentum": 0.9, "stop_epsilon": 1e-9, "seed": 5}
    if kind == "uint8":
        data, common["x_scale"] = (as_bytes(x)[0], y), 1 / 255
    whole = net(*widths)
    expected = dk.fit(whole, *data, **common)

    def interrupt(history):
        if len(history.rounds) == after + 1:
            raise Interrupted

    model, path = net(*widths), tmp_path / "run.pt"
    try:
        dk.fit(model, *data, checkpoint=path, callbacks=[interrupt], **common)
    except Interrupted:
        assert len(expected.rounds) > after
    fresh = net(*widths, seed=99)
    history = dk.fit(fresh, *data, checkpoint=path, **common)
    assert torch.equal(weights(fresh), weights(whole))
    assert [r.loss for r in history.rounds] == [r.loss for r in expected.rounds]
    assert [r.objective for r in history.rounds] == [r.objective for r in expected.rounds]
    assert history.weights_updated == expected.weights_updated
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_finished_run_is_given_back_without_training(tmp_path):
    x, y = blobs()
    model, again = net(6, 5, 3), net(6, 5, 3, seed=1)
    common = {"schedule": dk.RoundRobin(rounds=2), "checkpoint": tmp_path / "run.pt"}
    first = dk.fit(model, x, y, **common)
    second = dk.fit(again, x, y, **common)
    assert second.to_dict() == first.to_dict()
    assert torch.equal(weights(model), weights(again))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lr": 0.3}, "lr or lr_schedule"),
        ({"lr": lambda _: 0.2}, "lr or lr_schedule"),
        ({"seed": 8}, "seed"),
        ({"momentum": 0.5}, "momentum"),
        ({"schedule": dk.RoundRobin(rounds=9)}, "schedule"),
    ],
)
def test_another_runs_checkpoint_is_refused_and_kept(tmp_path, change, name):
    x, y = blobs()
    path = tmp_path / "run.pt"
    dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=1), checkpoint=path)
    content = path.read_bytes()
    model = net(6, 5, 3)
    before = weights(model)
    with pytest.raises(ValueError, match=f"checkpoint: .* belongs to another run, which differs in .*{name}"):
        dk.fit(model, x, y, **{"schedule": dk.RoundRobin(rounds=1), "checkpoint": path, **change})
    assert path.read_bytes() == content
    assert torch.equal(weights(model), before)


def test_a_checkpoint_of_other_data_or_frozen_layers_is_refused(tmp_path):
    x, y = blobs()
    common = {"schedule": dk.RoundRobin(rounds=1), "checkpoint": tmp_path / "run.pt"}
    dk.fit(net(6, 5, 3), x, y, **common)
    with pytest.raises(ValueError, match="differs in x;"):
        dk.fit(net(6, 5, 3), x.flip(0), y, **common)
    with pytest.raises(ValueError, match="differs in y;"):
        dk.fit(net(6, 5, 3), x, (y + 1) % 3, **common)
    frozen = net(6, 5, 3)
    frozen[0].requires_grad_(False)
    before = frozen[0].weight.clone()
    with pytest.raises(ValueError, match="differs in which layers are frozen"):
        dk.fit(frozen, x, y, **common)
    assert torch.equal(frozen[0].weight, before)


def test_another_budget_does_not_make_another_run(tmp_path):
    x, y = blobs()
    common = {"schedule": dk.RoundRobin(rounds=1), "checkpoint": tmp_path / "run.pt"}
    dk.fit(net(6, 5, 3), x, y, **common)
    assert len(dk.fit(net(6, 5, 3), x, y, prefix_budget=0, **common).rounds) == 1


@pytest.mark.parametrize("model", [net(6, 4, 3), net(6, 5, 3, activation=nn.ReLU)])
def test_another_models_checkpoint_is_refused(tmp_path, model):
    x, y = blobs()
    path = tmp_path / "run.pt"
    dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=1), checkpoint=path)
    with pytest.raises(ValueError, match=r"differs in .*model"):
        dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=1), checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path, content):
    x, y = blobs()
    path = tmp_path / "thesis.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint: .*thesis\.pt' is not a readable checkpoint"):
        dk.fit(net(6, 5, 3), x, y, checkpoint=path)
    assert path.read_bytes() == content


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path):
    x, y = blobs()
    path = tmp_path / "run.pt"
    dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=1), checkpoint=path)
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        model = net(6, 5, 3)
        before = weights(model)
        with pytest.raises(ValueError, match="is not a readable checkpoint"):
            dk.fit(model, x, y, schedule=dk.RoundRobin(rounds=1), checkpoint=path)
        assert torch.equal(weights(model), before)


def test_a_checkpoint_may_be_a_link_and_others_may_read_it(tmp_path):
    x, y = blobs()
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run.pt"
    link.symlink_to(tmp_path / "disk" / "real.pt")
    dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=1), checkpoint=link)
    assert link.is_symlink()
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "disk" / "real.pt").stat().st_mode == plain.stat().st_mode


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    x, y = blobs()
    path = tmp_path / "run.pt"
    real, calls = torch.save, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=3), checkpoint=path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    history = dk.fit(net(6, 5, 3), x, y, schedule=dk.RoundRobin(rounds=3), checkpoint=path)
    assert len(history.rounds) == 3
