"""How kernels are launched, whichever they are."""

import os
import subprocess
import sys

KEYS = """
import json, sys
from dante_kernels import kernels
from dante_kernels.kernels import launcher, layers, persistent, step

def launched(kernel):
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: kernel.cache_key
    launcher.launch(Kernel(), (1,), num_warps=4, num_stages=1)

first, second = (persistent.persistent, layers.product)[:: int(sys.argv[1])]
launched(first)
launched(second)
found = (persistent.persistent, layers.product, step.gradient, step.update)
print(json.dumps([kernel.cache_key for kernel in found]))
"""


def test_kernels_have_the_same_key_in_tritons_cache_whatever_is_launched_first():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = [
        subprocess.run([sys.executable, "-c", KEYS, order], env=environment, capture_output=True, text=True, check=True).stdout
        for order in ("1", "-1")
    ]
    assert found[0] == found[1]
