"""Every kernel, compiled for real GPUs as it would be launched: what the compiler made of it.

`resources.json` holds registers, shared memory and instructions of a step per kernel and compute capability, the largest over
the specializations of `compile_ahead.CASES`. DANTE_UPDATE_RESOURCES=1 with ``--nightly`` writes it anew. It is compared only
under the Triton version that wrote it: shared memory exactly, registers within 16 and instructions up to 2 % more, since
ptxas differs between builds.

One compute capability, 9.0, is compiled for; with ``--nightly`` also 8.0 and 10.0, and all tiles of the persistent plan, those
too that the model chooses for none of the cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import compile_ahead
import pytest
import triton

from dante_kernels.kernels import plan

HERE = Path(__file__).parent
TABLE = HERE / "resources.json"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_TOLERANCE = 16
INSTRUCTION_TOLERANCE = 1.02


@pytest.fixture(scope="module")
def capabilities(request: pytest.FixtureRequest) -> list[int]:
    return list(SHARED_LIMIT) if request.config.getoption("--nightly") else [90]


@pytest.fixture(scope="module")
def compiled(capabilities: list[int]) -> list[dict]:
    """All kernels, from a process for each compute capability in which the interpreter is off."""
    search = os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": search}
    tiles = ["--all-tiles"] if len(capabilities) > 1 else []
    running = [
        subprocess.Popen(
            [sys.executable, HERE / "compile_ahead.py", "--capability", str(capability), *tiles],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for capability in capabilities
    ]  # fmt: skip
    found = []
    for process, (printed, errors) in [(process, process.communicate()) for process in running]:
        assert process.returncode == 0, errors[-3000:]
        found += json.loads(printed)
    return found


def test_each_tile_is_compiled(compiled: list[dict], capabilities: list[int]) -> None:
    if len(capabilities) == 1:
        pytest.skip("with --nightly")
    names = ("BLOCK_B", "BLOCK_OUT", "BLOCK_IN", "SLICES")
    found = {
        (
            *(e["constants"][name] for name in names),
            e["warps"],
            e["constants"]["PARTS"],
            e["kernel"].split()[1],
            "blocks" in e["kernel"],
        )
        for e in compiled
        if "persistent" in e["kernel"]
    }
    plain, matrix = (plan.SHORT, plan.TALL, plan.DEEP, plan.LARGE), (plan.MATRIX, plan.MATRIX_WIDE)
    wanted = {(*tile, "ieee", False) for tiles in plain for tile in tiles} | {(*tile, "ieee", True) for tile in plan.BOTH}
    wanted |= {(*tile, "tf32", False) for tiles in matrix for tile in tiles} | {
        (*tile, "tf32", True) for tile in plan.MATRIX_BOTH
    }
    assert found >= wanted


def offenders(compiled: list[dict], wrong) -> list[str]:
    return [f"{e['kernel']} sm_{e['capability']}: {e}" for e in compiled if wrong(e)]


def test_all_capabilities_are_compiled(compiled: list[dict], capabilities: list[int]) -> None:
    assert {e["capability"] for e in compiled} == set(capabilities)


def allowed(e: dict) -> tuple[int, int]:
    """Bytes of stack, and accesses to it in a step, that a kernel may have: none, but for some persistent ones.

    All of them keep up to 16 bytes of addresses there for their end. For sm_100 one with uint8 data keeps more before its first
    step, and goes there seven times in a step, and another one three times; for sm_80 tiles of 128 rows go there twice. For
    models side by side one of large tiles with uint8 data goes there once; so does one with one barrier, and keeps more for its
    end; one of blocks in parallel in tiles of 32 units does twice; several tiles of rows of uint8 data before 64 units keep
    more; rounds on matrix units in tiles of 4 warps keep more for their end; and the tiles with the most inputs there go to the
    stack up to three times with transposed weights.
    """
    if "persistent" not in e["kernel"]:
        return 0, 0
    if ", models" in e["kernel"] and e["constants"]["ONE_BARRIER"]:
        return 288, 1
    if "tf32" in e["kernel"] and ", blocks" in e["kernel"] and e["warps"] == 4:
        return 48 if ", models" in e["kernel"] else 24, 0
    if ", models, blocks in parallel" in e["kernel"] and e["constants"]["BLOCK_OUT"] == 32 and not e["constants"]["ONE_TILE"]:
        return 24, 2
    if e["kernel"].startswith("persistent tf32 32x16x64 x 4 warps"):
        return 16, 3
    if e["kernel"].endswith("parts, models of uint8"):
        return 16, 1
    if ", models of uint8" in e["kernel"] and e["constants"]["BLOCK_NEXT"] == 64 and not e["constants"]["ONE_TILE"]:
        return 280, 74
    if e["capability"] == 100:
        return (400, 7) if e["kernel"].endswith("x 4 warps, 4 x 13 programs of uint8") else (16, 3)
    if e["capability"] == 80 and e["constants"]["BLOCK_B"] == 128:
        return 16, 2
    return 16, 0


def test_nothing_spills_in_a_step(compiled: list[dict]) -> None:
    assert not offenders(compiled, lambda e: e["spills"] > allowed(e)[1])


def test_the_stack_holds_nothing_but_addresses_that_only_a_persistent_kernels_end_needs(compiled: list[dict]) -> None:
    assert not offenders(compiled, lambda e: e["stack"] > allowed(e)[0])


def test_a_spill_in_a_loop_is_seen() -> None:
    inside = "/*0010*/ IADD R1 ; /*0020*/ STL [R1], R2 ; /*0030*/ @P0 BRA 0x10 ;"
    around = "/*0000*/ STL [R1], R2 ; /*0010*/ IADD R1 ; /*0030*/ @P0 BRA 0x10 ; /*0040*/ LDL R2, [R1] ; /*0050*/ BRA 0x50 ;"
    assert [compile_ahead.instructions_in_loops(sass) for sass in (inside, around)] == [["IADD", "STL", "BRA"], ["IADD", "BRA"]]
    before = "/*0010*/ STL [R1], R2 ; /*0020*/ BRA 0x10 ; " + inside.replace("/*00", "/*01").replace("0x10", "0x110")
    in_loops = [compile_ahead.instructions_in_loops(before + "/*0140*/ NOP ;", longest) for longest in (False, True)]
    assert [names.count("STL") for names in in_loops] == [2, 1]


def test_shared_memory_fits(compiled: list[dict]) -> None:
    """Of one program, or of as many of the persistent kernel's as may share a multiprocessor, each with 1 kB of its own."""

    def wrong(e: dict) -> bool:
        sharing = plan.WARPS // e["warps"] if "persistent" in e["kernel"] else 1
        return sharing * (e["shared"] + 1024) > SHARED_LIMIT[e["capability"]] + 1024

    assert {e["warps"] for e in compiled if "persistent" in e["kernel"]} == {4, 8}
    assert not offenders(compiled, wrong)


def test_a_step_has_as_many_instructions_as_the_model_counts(compiled: list[dict]) -> None:
    """Beside multiply-adds, within 25 %, where there is one tile of rows, and so no loop in a step but the barriers'."""
    checked = 0
    for e in compiled:
        c = e["constants"]
        if e["capability"] != 90 or not c.get("ONE_TILE") or c["ONE_BARRIER"] or c["SPLIT_IN"] == 1:
            continue
        if c["KIND"] or c["LOSS"] or "*u8" in e["specialization"]:
            continue
        own, has_next = c["BLOCK_B"] / (plan.LANES * e["warps"]), "'p_next_weight': '*fp32'" in e["specialization"]
        if c["PRECISION"] == "ieee":
            numbers = c["SLICES"] * (plan.TILE_X * c["BLOCK_IN"] + plan.TILE_Z * c["BLOCK_OUT"])
            numbers += plan.TILE_NEXT * c["BLOCK_NEXT"] * has_next
            counted = plan.STEP + plan.TILE_PART + numbers * own
        else:
            counted = plan.STEP_MATRIX + plan.MATRIX_X * c["SLICES"] * c["BLOCK_IN"] * own
            counted += plan.MATRIX_UNIT * c["BLOCK_OUT"] + plan.MATRIX_ROW * c["BLOCK_B"]
            counted *= 1 if has_next else plan.MATRIX_LAST
        counted *= plan.BESIDE_BOTH if "blocks" in e["kernel"] else 1
        found, checked = e["instructions"] - e["multiply_adds"], checked + 1
        assert 0.75 * counted < found < 1.25 * counted, f"{e['kernel']}: {found}, by the model {counted:.0f}"
    assert checked > 10


def test_no_kernel_is_a_trap(compiled: list[dict]) -> None:
    assert not offenders(compiled, lambda e: e["trap"] > 0 or e["registers"] < 16)


def test_grid_barriers_are_as_many_as_claimed_and_have_acquire_and_release(compiled: list[dict]) -> None:
    assert {e["barriers"] for e in compiled} == {0, 1, 2, 3, 4, 5}
    assert not offenders(compiled, lambda e: not e["barriers"] == e["acquires"] == e["releases"])


def test_a_programs_threads_wait_for_each_other_where_no_other_program_does(compiled: list[dict]) -> None:
    assert {e["own_barriers"] for e in compiled} >= {0, 2, 4, 6, 10}
    assert not offenders(compiled, lambda e: e["own_barriers"] != e["own_barriers_claimed"])


def test_products_use_the_arithmetic_they_claim(compiled: list[dict]) -> None:
    def wrong(e: dict) -> bool:
        products = ("product", "gradient", "persistent", "squares", "advance")
        if not e["kernel"].startswith(products) or e["kernel"].startswith("squares of"):
            return False
        return e["fma"] < 64 or e["mma"] > 0 if "ieee" in e["kernel"] else e["mma"] == 0

    assert not offenders(compiled, wrong)


def test_blocks_of_three_tf32_products_are_added_outside_the_matrix_unit(compiled: list[dict]) -> None:
    assert any("tf32x3" in e["kernel"] for e in compiled)
    assert not offenders(compiled, lambda e: "tf32x3" in e["kernel"] and e["rounded_additions"] == 0)


def test_resources_are_those_of_the_table(compiled: list[dict]) -> None:
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))
    for e in compiled:
        if not e["kernel"].endswith(compile_ahead.NOT_CHOSEN):
            largest = found[e["kernel"]][f"sm_{e['capability']}"]
            largest[:] = (max(old, e[name]) for old, name in zip(largest, ("registers", "shared", "instructions"), strict=True))
    if os.environ.get("DANTE_UPDATE_RESOURCES") == "1":
        lines = ",\n".join(f'    "{kernel}": {json.dumps(found[kernel])}' for kernel in sorted(found))
        columns = (
            '["registers a thread", "bytes of shared memory", "instructions of a step of the persistent kernel, loops once"]'
        )
        head = f'"triton": "{triton.__version__}",\n  "columns": {columns}'
        TABLE.write_text(f'{{\n  {head},\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {table['triton']}, this is {triton.__version__}")
    assert set(table["kernels"]) == set(found), "run again with DANTE_UPDATE_RESOURCES=1"
    for kernel, row in found.items():
        for capability, (registers, shared, instructions) in row.items():
            expected = table["kernels"][kernel][capability]
            assert shared == expected[1], f"{kernel} {capability}: shared memory {shared}, in the table {expected[1]}"
            assert abs(registers - expected[0]) <= REGISTER_TOLERANCE, f"{kernel} {capability}: {registers} registers"
            most = INSTRUCTION_TOLERANCE * expected[2]
            assert instructions <= most, f"{kernel} {capability}: {instructions} instructions, in the table {expected[2]}"
