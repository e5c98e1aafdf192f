"""The C++ kernels under AddressSanitizer and UBSan, on every instruction set; AVX-512 is emulated for processors without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cpu_kernels import SIZES

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


def runtime(name):
    """The path of a sanitizer's shared library, or nothing where the compiler does not come with it."""
    if sys.platform != "linux" or not shutil.which("g++"):
        return None
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


RUNTIMES = [runtime("libasan.so"), runtime("libubsan.so")]
pytestmark = pytest.mark.skipif(None in RUNTIMES, reason="needs Linux with g++ and its sanitizers")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a copy of the package whose extension is instrumented."""
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "dante_kernels", folder / "dante_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    flags = f"{FLAGS} -DDANTE_EMULATE_AVX512 -Wno-psabi"
    environment = os.environ | {"DANTE_BUILD_EXT": "1", "CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": FLAGS}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", f"{folder}/objects", "--build-lib", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    library = folder / "dante_kernels" / "_C.abi3.so"
    assert b"__asan_report_store" in library.read_bytes()
    return folder


def run(package, isa, *arguments):
    """Python with the instrumented package; a report ends it with an error."""
    environment = os.environ | {
        "DANTE_CPU_ISA": isa,
        "LD_PRELOAD": " ".join(RUNTIMES),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps some to its end
        "PYTHONPATH": str(package),
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=package, env=environment, capture_output=True, text=True, check=False
    )
    if f"{isa} was asked for, which this processor or build does not have" in done.stdout + done.stderr:
        pytest.skip(f"this processor does not have {isa}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


# The package is imported before pytest puts the checkout first on the path.
RUN = """
import sys
import dante_kernels.ops
import pytest

status = pytest.main(sys.argv[1:])
print(f"status {int(status)} of {sys.modules['dante_kernels.ops'].__file__}")
sys.exit(status)
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_the_operator_tests_run_clean(package, isa):
    tests = [str(ROOT / "tests" / "ops" / name) for name in ("test_operators.py", "test_promises.py", "test_cpu_kernels.py")]
    select = "(cpp or cpu_kernels) and not every_size and not instruction_set and not memory_of_a_pass and not second_thread"
    options = ["-o", "addopts=", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", select]
    out = run(package, isa, "-c", RUN, *options, *tests)
    assert out.splitlines()[-1].startswith(f"status 0 of {package}")
    assert " passed" in out


def test_every_size_from_1_to_70_runs_clean_and_right_on_avx512(package, pairs):
    assert float(run(package, "avx512", "-c", SIZES, str(pairs))) < 2e-6


PLANTED = """
#include "problem.h"
#include "standard.h"
namespace dante { namespace {
constexpr int kLanes = 4, kRows = 6, kVectors = 2;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
} }
#include "gemm.h"
int main(int count, char**) {
  const dante::Buffer buffer(5);
  buffer.data()[count == 1 ? 4 : 5] = 1;
}
"""


def test_a_write_one_number_behind_a_buffer_is_reported(tmp_path):
    (tmp_path / "planted.cpp").write_text(PLANTED)
    program = tmp_path / "planted"
    command = ["g++", "-std=c++17", *FLAGS.split(), f"-I{ROOT / 'csrc' / 'cpu'}", tmp_path / "planted.cpp", "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    assert subprocess.run([program], check=False).returncode == 0
    done = subprocess.run([program, "beyond"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
