"""What `setup.py` promises of DANTE_BUILD_EXT, on a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = "dante_kernels/_C.abi3.so"
NO_COMPILER = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), "no-such-compiler")

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("c++") or shutil.which("g++")), reason="needs Linux with a C++ compiler"
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of all that a build reads, with one small C++ file instead of the real ones."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "dante_kernels", tmp_path / "dante_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "small.cpp").write_text("int dante_small() { return 0; }\n")
    return tmp_path


def setup(sources: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if name not in {"DANTE_BUILD_EXT", *NO_COMPILER}}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments], cwd=sources, env={**keep, **environment}, capture_output=True, text=True
    )


def stale_extension(sources: Path) -> Path:
    extension = sources / EXTENSION
    extension.write_bytes(b"left from an earlier build")
    return extension


@pytest.mark.parametrize("value", ["2", "yes", "AUTO", ""])
def test_any_other_value_is_an_error(sources: Path, value: str) -> None:
    result = setup(sources, "--version", DANTE_BUILD_EXT=value)
    assert result.returncode != 0
    assert f"DANTE_BUILD_EXT: expected 0, 1 or auto, got {value!r}" in result.stderr


def test_1_without_a_compiler_is_an_error(sources: Path) -> None:
    result = setup(sources, "build_ext", "--inplace", DANTE_BUILD_EXT="1", **NO_COMPILER)
    assert result.returncode != 0
    assert "no-such-compiler" in result.stderr
    assert not (sources / EXTENSION).exists()


@pytest.mark.parametrize("environment", [{}, {"DANTE_BUILD_EXT": "auto"}])
def test_auto_without_a_compiler_warns_and_leaves_no_stale_extension(sources: Path, environment: dict[str, str]) -> None:
    extension = stale_extension(sources)
    result = setup(sources, "build_ext", "--inplace", **environment, **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    assert "WARNING: the C++ extension was not built" in result.stderr
    assert "no-such-compiler" in result.stderr
    assert not extension.exists()


@needs_compiler
def test_auto_with_a_failing_build_makes_a_pure_wheel(sources: Path) -> None:
    (sources / "csrc" / "broken.cpp").write_text("#error this does not compile\n")
    result = setup(sources, "bdist_wheel", DANTE_BUILD_EXT="auto")
    assert result.returncode == 0, result.stderr
    assert "WARNING: the C++ extension was not built" in result.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_0_builds_nothing_and_leaves_no_stale_extension(sources: Path) -> None:
    extension = stale_extension(sources)
    result = setup(sources, "build_ext", "--inplace", DANTE_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    assert not extension.exists()


def test_0_makes_a_pure_wheel_without_a_stale_extension(sources: Path) -> None:
    stale_extension(sources)
    result = setup(sources, "bdist_wheel", DANTE_BUILD_EXT="0", **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert EXTENSION not in names
    assert "dante_kernels/py.typed" in names


@needs_compiler
def test_a_wheel_with_the_extension_serves_every_python_from_3_10(sources: Path) -> None:
    result = setup(sources, "bdist_wheel", DANTE_BUILD_EXT="1")
    assert result.returncode == 0, result.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    assert EXTENSION in zipfile.ZipFile(wheel).namelist()
