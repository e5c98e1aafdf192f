"""Which backend serves a call: `reference` (plain torch), `cpp` (the compiled extension) or `triton` (GPU kernels).

A backend is a module or namespace with the functions of `OPERATORS`, whose arguments are those of the schemas in `ops`
without `backend`. Nothing is probed at import: the extension is loaded, and Triton imported, when first asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..activations import Activation

OPERATORS = ("layer_forward", "sngd_step_", "sngd_epoch_", "layer_gradient")
NAMES = ("reference", "cpp", "triton")
ENVIRONMENT_VARIABLE = "DANTE_BACKEND"
ISA_VARIABLE = "DANTE_CPU_ISA"

logger = logging.getLogger("dante_kernels")

# Whether this process was forked since this module was imported: torch's pool of threads is then not to be relied on.
_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


class _Reference:
    """The reference, spoken to in the flat arguments of the schemas."""

    @staticmethod
    def _suffix(weights: list[Tensor], biases: list[Tensor | None], activations: list[float]) -> tuple[Activation, list[Any]]:
        active, *rest = (Activation.decode(activations[i : i + 3]) for i in range(0, len(activations), 3))
        return active, list(zip(weights, biases, rest, strict=True))

    @staticmethod
    def layer_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: list[float], x_scale: float) -> Tensor:
        return reference.layer_forward(x, weight, bias, Activation.decode(activation), x_scale)

    @classmethod
    def layer_gradient(cls, weight, bias, x, target, suffix_weights, suffix_biases, activations, *rest):  # type: ignore[no-untyped-def]
        active, suffix = cls._suffix(suffix_weights, suffix_biases, activations)
        return reference.layer_gradient(weight, bias, x, target, suffix, active, *rest)

    @classmethod
    def sngd_step_(cls, weight, bias, x, target, suffix_weights, suffix_biases, activations, *rest):  # type: ignore[no-untyped-def]
        active, suffix = cls._suffix(suffix_weights, suffix_biases, activations)
        return reference.sngd_step_(weight, bias, x, target, suffix, active, *rest)

    @classmethod
    def sngd_epoch_(cls, weight, bias, x, target, order, batch_size, suffix_weights, suffix_biases, activations, *rest):  # type: ignore[no-untyped-def]
        active, suffix = cls._suffix(suffix_weights, suffix_biases, activations)
        return reference.sngd_epoch_(weight, bias, x, target, order, batch_size, suffix, active, *rest)


@functools.cache
def _load_cpp() -> tuple[Any, str | None]:
    """The compiled operators, or None and the reason why they cannot be had."""
    library = next(iter(sorted(Path(__file__).parent.parent.glob("_C*.so"))), None)
    if library is None:
        return None, "the C++ extension was not built; install g++ and reinstall, with DANTE_BUILD_EXT=1 to see why it fails"
    try:
        torch.ops.load_library(str(library))
        found = SimpleNamespace(**{name: getattr(torch.ops.dante_cpp, name).default for name in (*OPERATORS, "isa")})
    except (OSError, RuntimeError, AttributeError) as error:
        return None, f"{library.name} does not load with torch {torch.__version__}: {str(error).splitlines()[0]}"
    if _forked:
        torch.ops.dante_cpp.work_alone()
    try:
        found.isa()
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        return None, message[message.index(ISA_VARIABLE) :]
    return found, None


def cpu_kernels() -> str | None:
    """The instruction set of the C++ kernels, ``"avx512"``, ``"avx2"`` or ``"generic"``; None where they cannot be had."""
    found = _load_cpp()[0]
    return None if found is None else str(found.isa())


@functools.cache
def _load_triton() -> tuple[Any, str | None]:
    """The Triton launchers, or None and the reason why they cannot be had."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    from .. import kernels

    return kernels, None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve weights of this device and dtype; None where it can."""
    if name == "reference":
        return None
    if dtype != torch.float32:
        return f"it takes float32 weights, not {str(dtype).removeprefix('torch.')}"
    if name == "cpp":
        return _load_cpp()[1] if device.type == "cpu" else f"it runs on the CPU, not on {device.type}"
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"it runs on CUDA devices, not on {device.type} (there only interpreted, with TRITON_INTERPRET=1)"
    return _load_triton()[1]


@functools.cache
def _report_step_down(wanted: str, served_by: str, reason: str) -> None:
    logger.warning("backend %s cannot be used, %s serves instead: %s", wanted, served_by, reason)


@functools.cache
def _choose(backend: str, device: torch.device, dtype: torch.dtype, asked: str) -> str:
    if backend == "auto":
        fastest = "triton" if device.type == "cuda" else "cpp"
        reason = why_not(fastest, device, dtype)
        if reason is None:
            return fastest
        if reason.startswith(ISA_VARIABLE):
            raise ValueError(reason)
        _report_step_down(fastest, "reference", reason)
        return "reference"
    if backend not in NAMES:
        raise ValueError(f"{asked}: expected auto or one of {', '.join(NAMES)}, got {backend!r}")
    reason = why_not(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"{asked}: {backend!r} cannot serve this call: {reason}")
    return backend


def serving(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves calls on weights of this device and dtype.

    ``"auto"`` takes the environment variable DANTE_BACKEND where it is set; else the fastest backend for the weight's
    device, stepping down to the reference with one logged reason.

    Raises:
        ValueError: for an unknown name, or a backend named explicitly that cannot serve the call, or an instruction set in
            DANTE_CPU_ISA that is unknown or not to be had.
    """
    asked = "backend"
    if backend == "auto":
        backend, asked = os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE
    return _choose(backend, device, dtype, asked)


def choose(backend: str, weight: Tensor) -> Any:
    """The backend that serves a call on `weight`; see `serving`."""
    return module(serving(backend, weight.device, weight.dtype))


def module(name: str) -> Any:
    """The backend of this name, one that `serving` gave."""
    if name == "reference":
        return _Reference
    return _load_cpp()[0] if name == "cpp" else _load_triton()[0]


def availability() -> dict[str, str | None]:
    """For each backend None where some device here can use it, else the reason why not."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    reasons = {name: why_not(name, cpu, torch.float32) for name in NAMES}
    if not _interpreted():
        reasons["triton"] = why_not("triton", cuda, torch.float32) or (
            None if torch.cuda.is_available() else "no CUDA device is visible to torch"
        )
    return reasons
