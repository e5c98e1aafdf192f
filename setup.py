"""Builds the C++ extension `dante_kernels._C`, or, where that cannot be done, the package without it.

The environment variable DANTE_BUILD_EXT says which:

- ``auto`` (the default): build it; without a compiler, or if the build fails, warn and install pure Python.
- ``1``: build it; a failure is an error.
- ``0``: pure Python; an extension left from an earlier build in the same place is removed.

The extension keeps to LibTorch's stable ABI and to no Python API at all, so one file, `_C.abi3.so`, serves torch 2.11 and
newer on every Python from 3.10. It is for the CPU; nothing here looks for a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("DANTE_BUILD_EXT", "auto")
if MODE not in ("0", "1", "auto"):
    raise SystemExit(f"DANTE_BUILD_EXT: expected 0, 1 or auto, got {MODE!r}")

SOURCES = sorted(path.as_posix() for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(path.as_posix() for path in Path("csrc").rglob("*.h"))

COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # What is fused is written as fma() in the source. The compiler's own choice, different from one inlined copy of an
    # expression to the next, would break "the same bits whatever the number of rows".
    "-ffp-contract=off",
    # Neither changes a result; both let loops with sqrt and selects become vector code.
    "-fno-math-errno",
    "-fno-trapping-math",
]
MACROS = [
    ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # torch 2.11
    ("Py_LIMITED_API", "0x030a0000"),  # Python 3.10
]

WARNING = """
************************************************************************************************
dante_kernels: WARNING: the C++ extension was not built, this is a pure-Python install.
Everything works, but on the CPU the slower reference backend serves. The reason:
    {reason}
DANTE_BUILD_EXT=1 makes this an error, DANTE_BUILD_EXT=0 chooses it without a warning.
************************************************************************************************
"""


class BuildExtension(build_ext):
    """Builds the extension against the torch that is installed here, or leaves it out as DANTE_BUILD_EXT says."""

    def run(self) -> None:
        """Build, leave out, or fall back; see the module's docstring."""
        in_source_tree = self.inplace
        if MODE != "0":
            try:
                self._find_torch()
                super().run()
                return
            except Exception as error:
                if MODE == "1":
                    raise
                print(WARNING.format(reason=f"{type(error).__name__}: {error}"), file=sys.stderr, flush=True)
        self._leave_out(in_source_tree)

    def _find_torch(self) -> None:
        # Imported only here, so that a pure-Python install and the metadata need no torch.
        from torch.utils.cpp_extension import include_paths, library_paths

        for extension in self.extensions:
            extension.include_dirs += include_paths()
            extension.library_dirs += library_paths()

    def _leave_out(self, in_source_tree: bool) -> None:
        """Forget the extension, and remove what an earlier build left where this one would have put it."""
        for self.inplace in {False, in_source_tree}:
            for extension in self.extensions:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []


class Wheel(bdist_wheel):
    """A wheel tagged for any platform where the extension was left out."""

    def run(self) -> None:
        """Build the extension first: only then is it known what the wheel holds."""
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[
        Extension(
            "dante_kernels._C",
            SOURCES,
            depends=HEADERS,
            define_macros=MACROS,
            libraries=["torch_cpu"],
            extra_compile_args=COMPILE_ARGS,
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
