"""The one place where kernels are launched; tests replace `launch`, to compile instead or to count."""

from __future__ import annotations

from typing import Any

# Floating-point contraction is off everywhere: the default differs between versions of Triton, and a product and a sum
# that are written separately shall round separately in every specialization. Matrix products are fused regardless.
ENABLE_FP_FUSION = False


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
    """Launch a Triton kernel on the current stream of the current device.

    `args` are the kernel's run-time arguments in order, None for an absent pointer; `constants` its tl.constexpr ones.
    """
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=ENABLE_FP_FUSION, **constants)
