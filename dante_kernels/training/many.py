"""`fit_many`: train several independent models side by side."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from ..ops.blocks import Round, sngd_blocks_
from ..ops.checks import among
from ..ops.many import outcomes
from .fit import fit, prepare
from .history import History
from .run import Run, matmul_precision
from .trainer import Passes

_DEFAULTS = {name: p.default for name, p in inspect.signature(fit).parameters.items() if p.kind is p.KEYWORD_ONLY}


class FitManyError(RuntimeError):
    """Some models could not be trained to the end; the others were.

    Attributes:
        errors: what ended the training of a model, by its place in the list.
        histories: of all models, in order; those in ``errors`` have the rounds before.
    """

    def __init__(self, errors: dict[int, Exception], histories: list[History]) -> None:
        lines = [f"models[{i}]: {type(error).__name__}: {error}" for i, error in sorted(errors.items())]
        super().__init__(f"{len(errors)} of {len(histories)} models were not trained to the end\n" + "\n".join(lines))
        self.errors = errors
        self.histories = histories


def fit_many(models: Sequence[nn.Module], x: Any, y: Any = None, **settings: Any) -> list[History]:
    """Train several independent models, each as `fit` alone would, side by side.

    On the CPU each model has a thread of its own, as many at a time as torch.get_num_threads(). On a GPU the models that are
    at a pass of one kind (see `ops.sngd_epochs_`) make it in one launch where there is a kernel for it; so do they with a
    whole round where `fit` has it in one launch; all else is launched model by model, on streams side by side
    (docs/plans.md). Weights and records, but for the seconds, are those of `fit` alone with the same settings: bit for bit
    where the operators' bits depend on nothing else (``cpp``, ``triton``).
    The reference and fine-tuning compute with torch's products, whose bits may depend on the number of threads; there they
    are those of `fit` with one thread.

    Args:
        models: as `fit` takes each; they may differ in shape. No two may share parameters. **Mutated.**
        x, y: as `fit` takes them. Models that are alike share them, also where they are moved or converted.
        **settings: `fit`'s other arguments, for all models alike; and here, in x and y too, **a list always has one entry for
            each model**, such as ``lr=[0.1, 0.2, 0.3]``. One rate per layer is then a tuple, for all models, or a tuple or
            list inside the list; callbacks for all models are a tuple. ``precision`` must be one for all. Callbacks run in
            the models' threads, so those of different models at the same time.

    Returns:
        The `History` of each model, in order. Its seconds are those of the clock, with other models' work among them.

        Interrupted, such as by Ctrl-C, all models stop at the end of their blocks, or of those that are one call, keep
        those weights, and the interruption is raised.

    Raises:
        ValueError, TypeError, OSError: as `fit`, with the model's place in front, such as ``models[2]: lr: expected ...``;
            no model is changed then.
        FitManyError: where something (a gradient that is not finite, a callback's error) ended the training of some models.
            Each has the weights that `fit` would have left; the others were trained to the end. It holds all histories.

    >>> models = [nn.Sequential(nn.Linear(1, 1, bias=False)) for _ in range(2)]
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> histories = fit_many(models, x, 3 * x, lr=[0.1, 0.2], batch_size=2)
    >>> [history.blocks[0].lr for history in histories]
    [0.10000000149011612, 0.20000000298023224]
    """
    if not isinstance(models, list | tuple):
        raise TypeError(f"models: expected a list of models, got {type(models).__name__}")
    if not models:
        raise ValueError("models: expected at least one, got none")
    for name in settings:
        if name not in _DEFAULTS:
            raise TypeError(f"{name}: expected one of fit's arguments, {', '.join(_DEFAULTS)}")
    if isinstance(settings.get("precision"), list):
        raise TypeError("precision: expected one for all models, since it is the whole process's, got a list")
    given = {"x": x, "y": y, **_DEFAULTS, **settings}
    for name, value in given.items():
        if isinstance(value, list) and len(value) != len(models):
            raise ValueError(
                f"{name}: expected a list to have one entry for each of {len(models)} models, got {len(value)} entries; "
                "a value for all models must not be a list"
            )
    runs, made = [], dict[Any, Any]()
    for i, model in enumerate(models):
        own = {name: value[i] if isinstance(value, list) else value for name, value in given.items()}
        with among("models", i):
            runs.append(prepare(model, **own, made=made, label=f"models[{i}]  "))
    _check_apart(runs)
    return _SideBySide(runs).train()


def _check_apart(runs: list[Run]) -> None:
    """No parameter and no file may be written by two runs."""
    owner: dict[Any, int] = {}
    for i, run in enumerate(runs):
        for parameter in run.network.parameters():
            first = owner.setdefault(parameter.data_ptr() or id(parameter), i)
            if first != i:
                raise ValueError(f"models[{i}]: shares parameters with models[{first}]; each is trained by itself")
        if run.file is not None and owner.setdefault(run.file.path, i) != i:
            raise ValueError(f"models[{i}]: checkpoint: expected a file of its own, got that of models[{owner[run.file.path]}]")


class _SideBySide:
    """Trains runs in threads, until all are done or one is interrupted."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.errors: dict[int, Exception] = {}
        self.begin, self.stop = threading.Event(), threading.Event()
        self.interruption: BaseException | None = None
        self.threads = torch.get_num_threads()
        self.inference = torch.is_inference_mode_enabled()

    def train(self) -> list[History]:
        """Give each CPU model a thread, and each device whose models share launches one for all of them."""
        single, joint = [], dict[torch.device, list[int]]()
        for i, run in enumerate(self.runs):
            # Triton's interpreter runs on the CPU, but has the process's state, so only one thread may drive it.
            if run.x.is_cuda or run.served_by == "triton":
                joint.setdefault(run.x.device, []).append(i)
            else:
                single.append(i)
        at_a_time = min(self.threads, len(single))
        with (
            matmul_precision(self.runs[0].precision),
            ThreadPoolExecutor(at_a_time + len(joint), thread_name_prefix="dante-fit-many") as pool,
        ):
            try:
                jobs = [pool.submit(self._work, members, self.threads, _stream(device)) for device, members in joint.items()]
                jobs += [pool.submit(self._work, [i], self.threads // at_a_time, None) for i in single]
                self.begin.set()
                for job in jobs:
                    job.result()
            except BaseException:
                self.stop.set()
                self.begin.set()
                raise
        if self.interruption is not None:
            raise self.interruption
        histories = [run.history for run in self.runs]
        if self.errors:
            raise FitManyError(self.errors, histories) from self.errors[min(self.errors)]
        return histories

    def _work(self, members: list[int], threads: int, stream: torch.cuda.Stream | None) -> None:
        """Train these models in this thread, as if it were the caller's."""
        # Interrupted while it starts threads, the pool may lose sight of one; that one must not train.
        self.begin.wait()
        torch.set_num_threads(threads)
        try:
            with torch.cuda.stream(stream), torch.inference_mode(self.inference), torch.no_grad():
                self._train(members)
        finally:
            # The number is each thread's own, but that of threads to come is the one set last.
            torch.set_num_threads(self.threads)

    def _train(self, members: list[int]) -> None:
        """Train these models, each pass of all of them in one call."""
        training = {i: self.runs[i].passes() for i in members}
        results: dict[int, Any] = {}
        while training:
            calls = {}
            for i, passes in training.items():
                call = self._advance(i, passes, results.get(i))
                if call is not None:
                    calls[i] = call
            rounds = {i: call for i, call in calls.items() if isinstance(call, Round)}
            single = {i: call for i, call in calls.items() if not isinstance(call, Round)}
            try:
                results = dict(zip(single, outcomes([*single.values()]), strict=True))
                results |= zip(rounds, sngd_blocks_([*rounds.values()]), strict=True)
            except Exception as error:
                self.errors.update(dict.fromkeys(calls, error))
                return
            self.errors.update({i: result for i, result in results.items() if isinstance(result, Exception)})
            training = {i: training[i] for i in calls if i not in self.errors}

    def _advance(self, i: int, passes: Passes[History], result: Any) -> dict[str, Any] | Round | None:
        """Train up to the model's next pass; None where it has none, or shall not begin another block."""
        try:
            while not self.stop.is_set() or result is not None:
                call = passes.send(result)
                if call is not None:
                    return call
                result = None
        except StopIteration:
            pass
        except Exception as error:
            self.errors[i] = error
        except BaseException as interruption:
            self.interruption = interruption
            self.stop.set()
        return None


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
