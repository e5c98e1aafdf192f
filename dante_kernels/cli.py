"""The command `dante`: says what is installed here; cli_train.py, cli_reproduce.py and cli_bench.py have the other commands.

typer, rich, safetensors and pooch come with the extra ``cli``, scikit-learn with ``sklearn``. A command that lacks one
says which extra to install. What a user can get wrong is answered by one line on stderr: exit status 2 for options that
a command checks, 1 for what the data or the training rejects, 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

from . import cli_bench, cli_reproduce, cli_train
from .cli_common import errors_in_one_line, version_of

with contextlib.suppress(ImportError):  # `main` says what to install
    import typer


def main() -> None:
    """Run the command line; the entry point of `dante`."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        print('dante: the command line needs typer and rich: pip install "dante_kernels[cli]"', file=sys.stderr)
        raise SystemExit(1) from None
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_dante)
    app.command()(cli_train.train)
    app.command()(info)
    app.command()(cli_reproduce.reproduce)
    app.command(context_settings=cli_bench.SETTINGS)(cli_bench.bench)
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dante_kernels {version_of('dante_kernels')}")
        raise SystemExit


def _dante(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print version")] = False,
) -> None:
    """Train neural networks by DANTE: layer by layer, by stochastic normalized gradient descent."""


def info() -> None:
    """Print versions, the device, and which backends can be used here and why not."""
    with errors_in_one_line():
        import torch

        from .ops import backends

        library = next(iter(sorted(Path(__file__).parent.glob("_C*.so"))), None)
        lines = [
            ("dante_kernels", version_of("dante_kernels")),
            ("python", platform.python_version()),
            *((package, version_of(package)) for package in ("torch", "triton", "numpy")),
            ("CPU", f"{_cpu_model()}, {os.cpu_count()} logical CPUs, {torch.get_num_threads()} threads for torch"),
            *(_gpu(index) for index in range(torch.cuda.device_count())),
            *([] if torch.cuda.is_available() else [("CUDA device", "none is visible to torch")]),
            ("C++ extension", "not built" if library is None else f"built ({library.name})"),
        ]
        for name, reason in backends.availability().items():
            lines.append((f"backend {name}", "usable" if reason is None else f"not usable: {reason}"))
        lines.append(("CPU kernels", backends.cpu_kernels() or "none"))
        lines.append(("matmul precision", torch.get_float32_matmul_precision()))
        variables = (backends.ENVIRONMENT_VARIABLE, backends.ISA_VARIABLE)
        lines += [(variable, os.environ[variable]) for variable in variables if os.environ.get(variable)]
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            print(f"{name:{width}}  {text}")


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(index: int) -> tuple[str, str]:
    import torch

    found = torch.cuda.get_device_properties(index)
    return f"CUDA device {index}", f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"


if __name__ == "__main__":
    main()
