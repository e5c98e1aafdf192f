"""The one place where kernels are launched; tests replace `launch`, to compile instead or to count."""

from __future__ import annotations

import functools
import sys
from typing import Any

from triton import JITFunction

# Floating-point contraction is off everywhere: the default differs between versions of Triton, and a product and a sum
# that are written separately shall round separately in every specialization. Matrix products are fused regardless.
ENABLE_FP_FUSION = False


# What a kernel with `all_registers` may take: by default ptxas saves some, and spills, for more programs on a multiprocessor
# than there will ever be. A persistent one has them too.
REGISTERS = 255


def options_of(persistent: bool, all_registers: bool) -> dict[str, Any]:
    """The compiler's and the launch's options beside warps and stages."""
    options: dict[str, Any] = {"enable_fp_fusion": ENABLE_FP_FUSION}
    if persistent:
        options["launch_cooperative_grid"] = True
    if persistent or all_registers:
        options["maxnreg"] = REGISTERS
    return options


@functools.cache
def settle() -> None:
    """Let every kernel, and every function that it calls, have its key in Triton's cache, always in one order.

    Into a function's key Triton takes the constants of those it calls only if they have theirs already. So in another process,
    which launches kernels in another order, compiled ones would not be found again.
    """
    package = __name__.rpartition(".")[0]
    for name in sorted(name for name in sys.modules if name.startswith(f"{package}.")):
        for _, function in sorted(vars(sys.modules[name]).items()):
            if isinstance(function, JITFunction):  # no interpreted one
                _ = function.cache_key


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    num_stages: int,
    persistent: bool = False,
    all_registers: bool = False,
    **constants: Any,
) -> None:
    """Launch a Triton kernel on the current stream of the current device.

    `args` are the kernel's run-time arguments in order, None for an absent pointer; `constants` its tl.constexpr ones. The
    programs of a `persistent` one wait for each other: its launch fails unless all of them can be on the device at once.
    """
    settle()
    options = options_of(persistent, all_registers)
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **options, **constants)
