"""`fit_many` gives every model what `fit` alone would give it, side by side, and keeps each one's errors apart."""

import copy
import os
import signal
import threading

import pytest
import torch
from support import blobs, net, weights
from torch import nn

import dante_kernels as dk
from dante_kernels import kernels
from dante_kernels.training import many
from dante_kernels.training.trainer import Trainer

X, Y = blobs()


@pytest.fixture(params=[1, 2])
def threads(request):
    """Numbers of threads, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def groups(monkeypatch):
    """A stand-in for the joint kernel that notes how many calls come together."""
    sizes = []

    def together(calls):
        sizes.append(len(calls))
        return [kernels.sngd_epoch_(*args) for args in calls]

    monkeypatch.setattr(kernels, "sngd_epochs_", together, raising=False)
    return sizes


def records(history):
    """A history without its seconds."""
    plain = history.to_dict()
    for record in plain["blocks"] + plain["rounds"]:
        del record["seconds"]
    return plain


def each(settings, i):
    return {name: value[i] if isinstance(value, list) else value for name, value in settings.items()}


def assert_as_alone(models, x, y, **settings):
    """Train copies alone and the models together; returns the histories."""
    twins = copy.deepcopy(models)
    alone = [dk.fit(twin, x, y, **each(settings, i)) for i, twin in enumerate(twins)]
    together = dk.fit_many(models, x, y, **settings)
    assert [records(history) for history in together] == [records(history) for history in alone]
    for model, twin in zip(models, twins, strict=True):
        assert torch.equal(weights(model), weights(twin))
    return together


SETTINGS = {
    "lr": [0.1, 0.2, (0.3, 0.1), [0.1, 0.4], lambda r: 0.2 / (1 + r)],
    "seed": [0, 1, 2, 3, 4],
    "momentum": [0.0, 0.9, 0.0, 0.9, 0.5],
    "relative_lr": [False, True, False, False, True],
    "loss": ["mse", "cross_entropy", "mse", "binary_cross_entropy", "mse"],
    "batch_size": [20, 20, 7, 20, 11],
    "schedule": [
        dk.RoundRobin(rounds=3, inner_epochs=2),
        dk.RoundRobin(rounds=2, inner_steps=3),
        dk.Alternating(rounds=4),
        dk.RoundRobin(rounds=2, inner_epochs=1, inner_steps=2),
        dk.RoundRobin(rounds=2),
    ],
    "stop_epsilon": [None, None, 0.2, None, None],
    "validation": (X, Y),
}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_each_model_has_the_bits_of_fit_alone(threads, backend):
    models = [net(6, 8 + i, 3, seed=i) for i in range(5)]
    histories = assert_as_alone(models, X, Y, backend=backend, **SETTINGS)
    assert histories[2].stopped_by == "epsilon"


def test_models_of_many_elements_have_the_bits_of_fit_alone():
    """Where torch would share a sum among threads: norms of layers, validation, the objective."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9000, 300, generator=generator), torch.randint(0, 10, (9000,), generator=generator)
    settings = {"schedule": dk.RoundRobin(rounds=1, inner_steps=3), "relative_lr": True, "stop_epsilon": 1e-9}
    assert_as_alone([net(300, 120, 10, seed=i) for i in range(2)], x, y, lr=0.02, validation=(x, y), **settings)


def test_a_list_holds_an_entry_for_each_model_in_x_and_y_too():
    x, y = blobs(rows=40, n_in=4)
    models = [net(6, 5, 3), net(4, 5, 3)]
    twins = copy.deepcopy(models)
    dk.fit_many(models, [X, x], [Y, y], validation=[(X, Y), None])
    dk.fit(twins[0], X, Y)
    dk.fit(twins[1], x, y)
    assert [weights(m).tolist() for m in models] == [weights(m).tolist() for m in twins]


def test_models_of_one_device_make_their_passes_together(groups, monkeypatch):
    """Of four models one has other layers, and one ends early; bits are those of training alone."""
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")  # else rounds are one launch, with no passes in it
    models = [net(6, 4, 3, seed=0), net(6, 4, 3, seed=1), net(6, 5, 3, seed=2), net(6, 4, 3, seed=3)]
    stop = [None, None, None, lambda history: len(history.rounds) == 1]
    x, y = X[:22], Y[:22]
    assert_as_alone(
        models, x, y, backend="triton", batch_size=5, lr=[0.1, 0.2, 0.3, 0.4], seed=[3, 1, 4, 1], momentum=0.5,
        schedule=dk.RoundRobin(rounds=2, inner_epochs=1.6), callbacks=[() if one is None else (one,) for one in stop],
    )  # fmt: skip
    assert groups == [3] * 4 + [2] * 6  # a block of eight steps goes over into another pass, of the second round into two


def test_models_of_one_device_make_their_rounds_together(monkeypatch):
    """Of four models one has other layers, and one ends early; bits are those of training alone."""
    sizes, run = [], kernels.sngd_blocks_
    monkeypatch.setattr(kernels, "sngd_blocks_", lambda calls: sizes.append(len(calls)) or run(calls))
    models = [net(6, 4, 3, seed=0), net(6, 4, 3, seed=1), net(6, 5, 3, seed=2), net(6, 4, 3, seed=3)]
    stop = [None, None, None, lambda history: len(history.rounds) == 1]
    assert_as_alone(
        models, X[:22], Y[:22], backend="triton", batch_size=5, lr=[0.1, 0.2, 0.3, 0.4], seed=[3, 1, 4, 1], momentum=0.5,
        relative_lr=True, schedule=dk.RoundRobin(rounds=2, inner_epochs=2, inner_steps=4),
        callbacks=[() if one is None else (one,) for one in stop],
    )  # fmt: skip
    assert sizes == [1] * 7 + [3, 1, 2, 1]


def test_without_a_joint_kernel_passes_follow_one_another(monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")
    monkeypatch.delattr(kernels, "sngd_epochs_")
    models = [net(6, 4, 3, seed=i) for i in range(2)]
    schedule = [dk.RoundRobin(rounds=1, finetune_epochs=1), dk.RoundRobin(rounds=2, inner_steps=2)]
    assert_as_alone(models, X[:12], Y[:12], backend="triton", batch_size=5, schedule=schedule)


def test_cpu_models_have_a_thread_each():
    meeting = threading.Barrier(2, timeout=30)
    seen = []

    def meet(history):
        meeting.wait()  # breaks if the two models do not train at the same time
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        dk.fit_many([net(6, 5, 3, seed=i) for i in range(2)], X, Y, schedule=dk.RoundRobin(rounds=3), callbacks=(meet,))
        assert seen == [1] * 6
        with_new_thread = []
        for _ in range(2):
            thread = threading.Thread(target=lambda: with_new_thread.append(torch.get_num_threads()))
            thread.start()
            thread.join()
        assert [torch.get_num_threads(), *with_new_thread] == [2, 2, 2]
        meeting = threading.Barrier(1)
        dk.fit_many([net(6, 5, 3)], X, Y, schedule=dk.RoundRobin(rounds=1), callbacks=(meet,))
        assert seen[6:] == [2]
    finally:
        torch.set_num_threads(before)


def test_no_more_models_than_threads_train_at_a_time():
    before, running, most = torch.get_num_threads(), set(), []

    def note(history):
        running.add(threading.get_ident())
        most.append(len(running))

    torch.set_num_threads(2)
    try:
        dk.fit_many([net(6, 5, 3, seed=i) for i in range(6)], X, Y, schedule=dk.RoundRobin(rounds=1), callbacks=(note,))
    finally:
        torch.set_num_threads(before)
    assert max(most) <= 2


def test_data_is_converted_once_for_all_models(monkeypatch):
    runs = []
    monkeypatch.setattr(many._SideBySide, "train", lambda self: runs.extend(self.runs))
    x = X.reshape(90, 2, 3).transpose(0, 1).contiguous().transpose(0, 1)  # flattening copies it
    models = [nn.Sequential(nn.Flatten(), *net(6, 5, 3)) for _ in range(3)]
    dk.fit_many(models, x, Y.to(torch.int32), validation=(x, Y.to(torch.int32)))
    for run in runs[1:]:
        assert run.x is runs[0].x
        assert run.target is runs[0].target
        assert all(a is b for a, b in zip(run.validation[:2], runs[0].validation[:2], strict=True))
    runs.clear()
    dk.fit_many([net(6, 5, 6) for _ in range(2)], X.bfloat16())
    assert runs[0].target is runs[1].target


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": [0.1, 0.2, -1]}, ValueError, r"models\[2\]: lr: expected a finite number above 0, got -1"),
        ({"lr": [0.1, 0.2]}, ValueError, r"lr: expected a list to have one entry for each of 3 models, got 2 entries; a value"),
        ({"lr": [(0.1, 0.1), 0.2, (0.1, 0.1, 0.1)]}, ValueError, r"models\[2\]: lr: .*one for each of 2 layers, got 3"),
        (
            {"callbacks": [print]},
            ValueError,
            "callbacks: expected a list to have one entry for each of 3 models, got 1 entries",
        ),
        ({"callbacks": [print] * 3}, TypeError, r"models\[0\]: callbacks: expected a list of callables"),
        ({"x": X.tolist()}, ValueError, "x: expected a list to have one entry for each of 3 models, got 90"),
        ({"seed": ["a", 1, 2]}, TypeError, r"models\[0\]: seed: expected a whole number"),
        ({"precision": ["high"] * 3}, TypeError, "precision: expected one for all models"),
        ({"rate": 0.1}, TypeError, "rate: expected one of fit's arguments, loss, "),
        ({"backend": ["cpp", "reference", "abacus"]}, ValueError, r"models\[2\]: backend: expected auto or one of"),
        ({"device": ["cpu", "cpu", "gpu"]}, ValueError, r"models\[2\]: device: expected one such as"),
        ({"checkpoint": [None, None, "no/folder/x.pt"]}, FileNotFoundError, r"models\[2\]: checkpoint: expected a file in"),
        ({"checkpoint": "x.pt"}, ValueError, r"models\[1\]: checkpoint: expected a file of its own, got that of models\[0\]"),
    ],
)
def test_a_wrong_argument_is_named_and_no_model_is_changed(change, error, message):
    models = [net(6, 5, 3, seed=i) for i in range(3)]
    before = [weights(model) for model in models]
    arguments = {"x": X, "y": Y, **change}
    with pytest.raises(error, match=message):
        dk.fit_many(models, arguments.pop("x"), arguments.pop("y"), **arguments)
    assert all(torch.equal(weights(model), old) for model, old in zip(models, before, strict=True))


def test_a_wrong_checkpoint_or_frozen_model_is_found_before_any_training(tmp_path):
    dk.fit(net(6, 5, 3), X, Y, seed=9, schedule=dk.RoundRobin(rounds=1), checkpoint=tmp_path / "other.pt")
    models = [net(6, 5, 3, seed=i) for i in range(2)]
    before = weights(models[0])
    with pytest.raises(ValueError, match=r"models\[1\]: checkpoint: .*belongs to another run, which differs in schedule"):
        dk.fit_many(models, X, Y, checkpoint=[tmp_path / "a.pt", tmp_path / "other.pt"])
    with pytest.raises(ValueError, match=r"models\[1\]: model: no layer has parameters that require gradients"):
        dk.fit_many([models[0], net(6, 5, 3).requires_grad_(False)], X, Y)
    assert torch.equal(weights(models[0]), before)


def test_models_must_be_a_list_of_models_that_share_nothing():
    model = net(6, 5, 3)
    with pytest.raises(TypeError, match="models: expected a list of models, got Sequential"):
        dk.fit_many(model, X, Y)
    with pytest.raises(ValueError, match="models: expected at least one"):
        dk.fit_many([], X, Y)
    with pytest.raises(ValueError, match=r"models\[2\]: shares parameters with models\[0\]"):
        dk.fit_many([model, net(6, 5, 3), model], X, Y)
    other = net(6, 5, 3)
    other[2].bias = model[2].bias
    with pytest.raises(ValueError, match=r"models\[1\]: shares parameters with models\[0\]"):
        dk.fit_many([model, other], X, Y)


def test_a_plan_that_one_model_cannot_have_is_that_model_s_error_alone(monkeypatch):
    monkeypatch.setenv("DANTE_GPU_PLAN", "persistent")
    for deep in (0, 1):
        models = [net(6, 5, 4, 4, 3) if i == deep else net(6, 3) for i in range(2)]
        twin = copy.deepcopy(models[1 - deep])
        settings = {"batch_size": 10, "schedule": dk.RoundRobin(rounds=2), "backend": "triton"}
        with pytest.raises(dk.FitManyError, match=rf"models\[{deep}\]: ValueError: .*3 layers after it > 2") as caught:
            dk.fit_many(models, X[:20], Y[:20], **settings)
        dk.fit(twin, X[:20], Y[:20], **settings)
        assert torch.equal(weights(models[1 - deep]), weights(twin))
        assert [len(history.rounds) for history in caught.value.histories] == [0 if i == deep else 2 for i in range(2)]


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_model_that_fails_does_not_take_the_others_along(backend, groups):
    x, y = X[:12], Y[:12]
    models = [net(6, 4, 3, seed=i) for i in range(3)]
    with torch.no_grad():
        models[1][0].weight[0, 0] = float("nan")
    twins = copy.deepcopy(models)
    settings = {"batch_size": 5, "schedule": dk.RoundRobin(rounds=3, inner_steps=2), "backend": backend}

    def fail(history):
        if len(history.rounds) == 2:
            raise OSError("no space left")

    with pytest.raises(
        dk.FitManyError, match=r"2 of 3 models were not trained to the end\nmodels\[1\]: NonFiniteError"
    ) as caught:
        dk.fit_many(models, x, y, callbacks=[(), (), (fail,)], **settings)
    error = caught.value
    assert {i: type(e) for i, e in error.errors.items()} == {1: dk.NonFiniteError, 2: OSError}
    assert [len(history.rounds) for history in error.histories] == [3, 0, 2]
    assert error.__cause__ is error.errors[1]
    with pytest.raises(dk.NonFiniteError) as alone:
        dk.fit(twins[1], x, y, **settings)
    assert str(alone.value) == str(error.errors[1])
    assert records(dk.fit(twins[0], x, y, **settings)) == records(error.histories[0])
    settings["schedule"] = dk.RoundRobin(rounds=2, inner_steps=2)
    dk.fit(twins[2], x, y, **settings, lr_schedule=lambda r, _: [1, 0.75][r])  # cosine's first two factors of three
    for model, twin in zip(models, twins, strict=True):
        torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("how", ["signal", "callback"])
def test_an_interruption_stops_all_at_the_end_of_a_block(backend, how, monkeypatch):
    """A block is a pass and a half here, and nothing is left off within one."""
    monkeypatch.setenv("DANTE_GPU_PLAN", "fused")  # else a round of such blocks is one launch
    ends = {}
    original = Trainer._run_block

    def run_block(self, *args):
        turn = yield from original(self, *args)
        place = self.network.layers[0].weight.data_ptr()
        ends[place] = torch.cat([part.flatten() for w, b, _ in self.network.layers for part in (w, b)])
        return turn

    def interrupt(history):
        if len(history.rounds) == 2:
            if how == "callback":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_run_block", run_block)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    models = [net(6, 4, 3, seed=i) for i in range(3)]
    untrained = [weights(model) for model in models]
    try:
        with pytest.raises(KeyboardInterrupt):
            dk.fit_many(
                models, X[:12], Y[:12], schedule=dk.RoundRobin(rounds=3000, inner_epochs=1.5), batch_size=10,
                backend=backend, callbacks=[(), (interrupt,), ()],
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dante")]
    for model, start in zip(models, untrained, strict=True):
        assert torch.equal(weights(model), ends.get(model[0].weight.data_ptr(), start))
    assert models[1][0].weight.data_ptr() in ends
    if backend == "cpp":  # two threads: the third model had not begun
        assert torch.equal(weights(models[2]), untrained[2])


def test_it_trains_where_the_caller_is_in_inference_mode():
    with torch.inference_mode():
        models = [net(6, 5, 3, seed=i) for i in range(2)]
        assert_as_alone(models, X, Y, schedule=dk.RoundRobin(rounds=2), backend="reference")


def test_progress_names_the_model(capsys):
    dk.fit_many([net(6, 5, 3, seed=i) for i in range(2)], X, Y, schedule=dk.RoundRobin(rounds=2), progress=[False, True])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  loss")[0] for line in lines] == ["models[1]  round 1", "models[1]  round 2"]


def test_checkpoints_go_on_bit_for_bit(tmp_path):
    def train(models, files, **more):
        return dk.fit_many(models, X, Y, schedule=dk.RoundRobin(rounds=3), seed=[0, 1], checkpoint=files, **more)

    whole = [net(6, 5, 3, seed=i) for i in range(2)]
    expected = train(whole, None)
    files = [tmp_path / "0.pt", tmp_path / "1.pt"]

    def interrupt(history):
        if len(history.rounds) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([net(6, 5, 3, seed=i) for i in range(2)], files, callbacks=[(interrupt,), ()])
    models = [net(6, 5, 3, seed=i + 9) for i in range(2)]
    if not files[1].exists():  # the second model may not have ended a round: it begins with its own weights
        models[1] = net(6, 5, 3, seed=1)
    histories = train(models, files)
    assert [r.loss for h in histories for r in h.rounds] == [r.loss for h in expected for r in h.rounds]
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(models, whole, strict=True))


def test_a_model_that_is_moved_in_inference_mode_can_be_trained_outside_it(monkeypatch):
    model, (x, y) = net(6, 5, 3), blobs()
    modes, move = [], model.to

    def to(device):
        modes.append(torch.is_inference_mode_enabled())
        return move(device)

    monkeypatch.setattr(model, "to", to)
    with torch.inference_mode():
        dk.fit(model, x, y, device="cpu", schedule=dk.RoundRobin(rounds=1))
    assert modes == [False]
