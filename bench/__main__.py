"""Runs the benchmarks of this checkout: `python -m bench` from its top, or this file from anywhere.

As a file it leaves dante_kernels to PYTHONPATH or the installed package, and takes the checkout's only where there is none.
`bench` is always that of this file: another commit's checkout on PYTHONPATH, which has a `bench` too, is only measured.
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [*(place for place in sys.path if Path(place).resolve() != HERE), str(HERE.parent)]
if "bench" not in sys.modules:
    spec = importlib.util.spec_from_file_location("bench", HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    assert spec is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)

from bench.app import main

if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("dante bench: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
