"""Compile for real GPUs, on a machine without one, exactly what would be launched; print what came out.

Runs the real orchestration on CPU tensors with `launch` replaced by a compiler call, as its own process, since the
interpreter must be off: ``TRITON_INTERPRET=0 python tests/kernels/compile_ahead.py``. Prints one JSON list; each entry is
one kernel in one specialization for one compute capability, with its registers, stack (where spilled registers go),
shared memory and matrix instructions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dante_kernels import kernels, losses
from dante_kernels.kernels import launcher, layers, plan

CAPABILITIES = (80, 90, 100)
NOT_CHOSEN = ", not chosen"  # the end of a label, of tiles that the model does not choose for any case here
EPILOGUES = {layers.FORWARD: "forward", layers.LAST: "last", layers.BACKWARD: "backward"}
LEAKY, SIGMOID, TANH = [0.0, 0.01, 1.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0]
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip

# widths, batch, loss, activation, precision, what is special
CASES = [
    ((784, 100, 10), 20, "mse", LEAKY, "highest", ""),
    ((784, 100, 10), 100, "cross_entropy", LEAKY, "highest", "momentum"),
    ((784, 100, 10), 1, "mse", LEAKY, "high", ""),
    ((784, 100, 10), 20, "mse", LEAKY, "medium", ""),
    ((784, 100, 10), 20, "mse", LEAKY, "medium", "bfloat16"),
    ((784, 100, 10), 100, "mse", LEAKY, "highest", "bfloat16"),
    ((1024, 1024, 10), 100, "mse", LEAKY, "highest", "bfloat16"),
    ((784, 100, 10), 20, "mse", LEAKY, "medium", "uint8"),
    ((784, 100, 10), 100, "mse", LEAKY, "highest", "uint8"),
    ((1024, 1024, 10), 100, "mse", LEAKY, "highest", "uint8"),
    ((3072, 512, 10), 500, "mse", LEAKY, "high", "uint8"),
    ((3072, 2048, 10), 100, "mse", LEAKY, "highest", "uint8"),
    ((784, 400, 200, 10), 500, "cross_entropy", TANH, "highest", ""),
    ((784, 400, 784), 100, "binary_cross_entropy", SIGMOID, "highest", ""),
    ((784, 400, 784), 100, "cross_entropy", LEAKY, "high", ""),
    ((3072, 512, 10), 100, "mse", LEAKY, "highest", ""),
    ((3072, 512, 10), 500, "mse", LEAKY, "high", "transposed"),
    ((3072, 512, 10), 100, "mse", LEAKY, "medium", ""),
    ((3072, 2048, 10), 100, "mse", LEAKY, "highest", ""),
    ((70000, 30), 20, "cross_entropy", LEAKY, "highest", ""),
    ((1024, 3072), 100, "mse", SIGMOID, "high", ""),
    ((5, 3, 1), 1, "mse", SIGMOID, "highest", ""),
]

PERSISTENT_CASES = [
    ((784, 100, 10), 60, "cross_entropy", LEAKY, "highest", "momentum"),
    ((784, 100, 10), 20, "mse", LEAKY, "highest", "momentum"),
    ((784, 100, 10), 60, "binary_cross_entropy", SIGMOID, "highest", ""),
    ((784, 400, 10), 20, "mse", LEAKY, "highest", "momentum"),
    ((784, 400, 10), 20, "cross_entropy", TANH, "highest", ""),
    ((784, 10), 20, "cross_entropy", LEAKY, "highest", "momentum"),
    ((64, 100, 10), 20, "mse", LEAKY, "highest", ""),
    ((64, 100), 20, "mse", SIGMOID, "highest", "transposed"),
    ((64, 100, 10), 20, "mse", LEAKY, "highest", "bfloat16"),
    ((784, 100, 10), 20, "mse", LEAKY, "highest", "uint8"),
    ((784, 100, 10), 60, "mse", LEAKY, "highest", "uint8 momentum"),
    ((784, 10), 20, "cross_entropy", LEAKY, "highest", "uint8 momentum"),
    ((30, 10), 20, "cross_entropy", LEAKY, "highest", "momentum"),
    ((784, 100, 10), 100, "mse", LEAKY, "highest", "momentum"),
    ((784, 100, 10), 100, "cross_entropy", SIGMOID, "highest", ""),
    ((784, 10), 100, "cross_entropy", LEAKY, "highest", "momentum"),
    ((784, 400, 10), 100, "mse", LEAKY, "highest", "momentum"),
    ((784, 100, 10), 20, "mse", LEAKY, "high", "momentum"),
    ((784, 100, 10), 20, "cross_entropy", TANH, "high", ""),
    ((784, 128, 64), 20, "binary_cross_entropy", SIGMOID, "high", ""),
    ((784, 100, 10), 20, "cross_entropy", LEAKY, "high", "uint8 momentum"),
    ((784, 100, 10), 20, "mse", LEAKY, "high", "bfloat16"),
    ((784, 100, 10), 20, "mse", LEAKY, "medium", "momentum"),
    ((784, 10), 20, "cross_entropy", LEAKY, "high", "momentum"),
    ((784, 10), 20, "cross_entropy", LEAKY, "medium", ""),
    ((100, 40, 10), 20, "mse", LEAKY, "high", "momentum"),
    ((784, 32, 10), 20, "cross_entropy", TANH, "high", "uint8"),
    ((784, 17, 64), 20, "binary_cross_entropy", SIGMOID, "high", ""),
    ((784, 100, 10), 20, "mse", LEAKY, "highest", "momentum, two models"),
    ((784, 100, 10), 20, "mse", LEAKY, "high", "momentum, two models"),
    ((784, 100, 10), 20, "cross_entropy", TANH, "high", "two models"),
    ((784, 128, 64), 20, "binary_cross_entropy", SIGMOID, "high", "uint8 two models"),
    ((784, 10), 20, "cross_entropy", LEAKY, "highest", "two models"),
    ((784, 400, 200, 10), 20, "mse", LEAKY, "highest", "momentum"),
    ((784, 400, 200, 10), 20, "cross_entropy", TANH, "highest", ""),
    ((784, 400, 200, 10), 100, "mse", SIGMOID, "highest", "uint8 momentum"),
    ((784, 100, 100, 10), 20, "mse", LEAKY, "highest", "momentum"),
    ((784, 100, 100, 10), 20, "cross_entropy", LEAKY, "highest", "momentum, two models"),
    ((784, 100, 200, 10), 20, "cross_entropy", TANH, "highest", "momentum, two models"),
    ((784, 100, 100, 16), 20, "binary_cross_entropy", SIGMOID, "highest", "bfloat16"),
    ((100, 40, 20, 10), 20, "mse", TANH, "highest", "transposed"),
    ((3072, 512, 10), 20, "mse", LEAKY, "highest", "momentum"),
    ((3072, 512, 16), 20, "cross_entropy", TANH, "highest", "uint8 momentum"),
    ((3072, 512, 10), 100, "binary_cross_entropy", SIGMOID, "highest", "uint8 momentum"),
    ((3072, 512, 10), 20, "mse", TANH, "highest", "transposed"),
    ((3072, 512), 20, "mse", SIGMOID, "highest", "momentum"),
    ((1536, 512, 10), 20, "mse", LEAKY, "highest", "momentum, two models"),
    ((1536, 512, 10), 20, "cross_entropy", TANH, "highest", "uint8 two models"),
    ((1536, 512), 20, "mse", SIGMOID, "highest", "uint8 momentum, two models"),
    ((12288, 60), 20, "cross_entropy", LEAKY, "highest", "momentum"),
]

# widths, batch, whether with momentum and relative rates, models, blocks of a cycle that are in parallel, precision, type of x
BLOCKS_CASES = [
    ((784, 100, 10), 20, True, 1, 0, "highest", torch.float32),
    ((784, 100, 10), 20, True, 1, 2, "highest", torch.float32),
    ((784, 100, 10), 100, False, 1, 0, "highest", torch.float32),
    ((784, 100, 10), 20, True, 2, 0, "highest", torch.float32),
    ((784, 100, 10), 20, True, 1, 2, "highest", torch.uint8),
    ((784, 100, 10), 20, True, 1, 2, "high", torch.float32),
    ((784, 100, 10), 20, True, 1, 2, "high", torch.uint8),
    ((784, 100, 10), 20, True, 2, 2, "high", torch.float32),
]

LIBRARY_CASES = [
    ((3072, 512, 10), 500, "mse", LEAKY, "high", "uint8 momentum"),
    ((784, 400, 200, 10), 500, "cross_entropy", TANH, "highest", ""),
    ((12288, 3072, 1536, 10), 500, "mse", SIGMOID, "medium", "transposed"),
]

STREAMED_CASES = [
    ((3072, 2048, 10), 100, "mse", LEAKY, "highest", "momentum"),
    ((3072, 2048, 10), 20, "mse", LEAKY, "highest", ""),
    ((3072, 2048, 10), 100, "mse", LEAKY, "high", "bfloat16"),
    ((3072, 2048, 10), 50, "mse", LEAKY, "high", "transposed"),
    ((3072, 2048, 10), 20, "mse", LEAKY, "medium", ""),
    ((12288, 3072, 1536, 10), 200, "cross_entropy", LEAKY, "high", "momentum"),
    ((1024, 12288), 60, "mse", SIGMOID, "high", ""),
    ((70000, 100), 20, "cross_entropy", LEAKY, "highest", ""),
    ((21, 18, 3), 7, "mse", LEAKY, "highest", "momentum"),
    ((3072, 2048, 10), 20, "mse", LEAKY, "highest", "uint8"),
]


class Collector:
    """Stands in for `launcher.launch`: keeps each different specialization once."""

    def __init__(self) -> None:
        self.found: dict[str, tuple] = {}

    def launch(self, kernel, grid, *args, num_warps, num_stages, persistent=False, all_registers=False, **constants) -> None:
        signature, constexprs, attributes = {}, dict(constants), {}
        names = kernel.arg_names
        assert [name for name in names if name not in constants] == names[: len(args)]
        varying = {p.name for p in kernel.params if p.do_not_specialize}
        for i, (name, value) in enumerate(zip(names, args, strict=False)):
            aligned = False
            if value is None or (type(value) is int and value == 1 and name not in varying):
                signature[name], constexprs[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                aligned = value.data_ptr() % 16 == 0
            elif type(value) is int:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                aligned = value % 16 == 0 and name not in varying
            else:
                signature[name] = "fp32"
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        options = {"num_warps": num_warps, "num_stages": num_stages, **launcher.options_of(persistent, all_registers)}
        label = kernel.__name__
        if "EPILOGUE" in constants:
            label = "epilogue" if args[0] is None else label
            label += " " + EPILOGUES[constants["EPILOGUE"]]
        if label.startswith("epilogue"):  # without a product there is no precision
            label += f" {constants['BLOCK_B']}x{constants['BLOCK_OUT']}"
        elif "PRECISION" in constants:
            rows, columns, inner = (
                ("BLOCK_OUT", "BLOCK_IN", "BLOCK_B")
                if label in ("gradient", "squares", "advance")
                else ("BLOCK_B", "BLOCK_OUT", "BLOCK_IN")
            )
            label += f" {constants['PRECISION']} {constants[rows]}x{constants[columns]}x{constants[inner]}"
            if "BLOCK_NEXT" in constants and not persistent:
                label += f", {constants['BLOCK_NEXT'] if args[6] is not None else 'no'} next rows"
            if persistent:
                label += f" x {num_warps} warps, {constants['SPLIT_OUT']} x {constants['SPLIT_IN']} programs"
                label += f", {constants['PARTS']} parts" if constants["PARTS"] > 1 else ""
                label += ", models" if signature["p_offsets"] != "constexpr" else ""
                label += ", two layers after" if signature["p_last_weight"] != "constexpr" else ""
                label += ", blocks" if signature["p_schedule"] != "constexpr" else ""
                label += " in parallel" if constants["PARALLEL"] else ""
        if label.startswith("gradient") and signature["p_x"] == "constexpr":
            label = label.replace("gradient", "squares of the gradient")
        if label.startswith("gram"):
            label += f" {constants['BLOCK']}"
        if "*u8" in signature.values():
            label += " of uint8"
        key = repr((label, signature, constexprs, attributes, options))
        self.found.setdefault(key, (label, kernel, signature, constexprs, attributes, options))


def serves(widths, batch, loss, activation, precision, special) -> bool:
    """Whether the persistent plan serves a case on an H200."""
    shape = plan.Shape(widths, batch, losses.code(loss), momentum="momentum" in special, precision=precision)
    shape = shape._replace(x_dtype=torch.bfloat16 if special == "bfloat16" else torch.float32)
    return plan.persistent(shape, 132) is not None


def run_case(widths, batch, loss, activation, precision, special) -> None:
    """Call the operators as a user would, so that everything they launch is collected."""
    torch.set_float32_matmul_precision(precision)
    dtype = torch.bfloat16 if "bfloat16" in special else torch.uint8 if "uint8" in special else torch.float32
    x_scale = 1 / 255 if dtype == torch.uint8 else 1.0
    x = torch.zeros(2 * batch, widths[0], dtype=dtype)
    weights = [torch.zeros(n_out, n_in) for n_in, n_out in itertools.pairwise(widths)]
    biases = [torch.zeros(n_out) for n_out in widths[1:]]
    if "transposed" in special:
        weights[0] = torch.zeros(widths[0], widths[1]).t()
    velocities = [torch.zeros_like(weights[0]), torch.zeros_like(biases[0])] if "momentum" in special else [None, None]
    classes = widths[-1] in (10, 30)
    target = torch.zeros(2 * batch, dtype=torch.int64) if classes else torch.zeros(2 * batch, widths[-1])
    order = torch.arange(2 * batch) if classes else None
    momentum = 0.9 if "momentum" in special else 0.0
    numbers = activation * len(weights)
    code, lr = losses.code(loss), torch.tensor(0.1)
    call = (
        weights[0], biases[0], x, target, order, batch, weights[1:], biases[1:], numbers, code, lr,
        *velocities, momentum, momentum > 0, x_scale,
    )  # fmt: skip
    if "two models" in special:
        kernels.sngd_epochs_([call, call])
        return
    kernels.sngd_epoch_(*call)
    kernels.layer_forward(x, weights[0], biases[0], activation, x_scale)
    if "momentum" in special and len(weights) > 1:
        kernels.layer_gradient(weights[0], None, x, target, weights[1:], biases[1:], numbers, code, x_scale)
        kernels.sngd_step_(weights[1], biases[1], torch.zeros(batch, widths[1]), target[:batch], [], [], LEAKY, code, lr)


def run_all_tiles() -> None:
    """Passes and rounds with each of the persistent plan's tiles, whatever the model chooses, as one tile and as several."""
    names = ("SHORT", "TALL", "DEEP", "BOTH", "LARGE", "MATRIX", "MATRIX_WIDE", "MATRIX_BOTH")
    lists = {name: getattr(plan, name) for name in names}
    kernels._most_programs = lambda tensor: 1000
    plan.ONE_BARRIER_ROWS = 0
    for name, tiles in lists.items():
        if name == "LARGE":  # chosen for some of the cases above
            continue
        matrix, x_dtype = "MATRIX" in name, torch.float32 if name == "MATRIX_WIDE" else torch.uint8
        precision, narrow = "high" if matrix else "highest", "" if name == "MATRIX_WIDE" else "uint8 "
        for tile in tiles:
            for other in lists:
                setattr(plan, other, (tile,) if other == name else ())
            plan.choose.cache_clear()
            plan.blocks.cache_clear()
            for batch in (tile.rows, 3 * tile.rows)[: 1 if matrix or name == "TALL" else 2]:
                if "BOTH" in name:
                    for cycle, dtype in itertools.product((0, 2), (torch.float32, x_dtype)):
                        run_blocks((784, 100, 10), batch, True, 2, cycle, precision, dtype)
                elif name == "DEEP":
                    run_case((784, 100, 200, 10), batch, "cross_entropy", TANH, precision, "uint8 momentum, two models")
                else:
                    run_case((784, 100, 10), batch, "cross_entropy", TANH, precision, narrow + "momentum, two models")
                    run_case((784, 100), batch, "mse", SIGMOID, precision, "momentum, two models")
                    if matrix:
                        run_case((783, 99, 9), batch, "mse", TANH, precision, "momentum")
                        run_case((784, 100, 10), batch, "mse", LEAKY, precision, "momentum transposed, two models")
                    if name == "MATRIX":
                        run_case((784, 100, 10), batch, "cross_entropy", TANH, precision, "bfloat16 momentum, two models")
                    if name == "SHORT":
                        run_case((784, 128, 64), batch, "binary_cross_entropy", SIGMOID, precision, "uint8 two models")


def run_blocks(widths, batch, full, models, cycle, precision, x_dtype) -> None:
    """Two layers' blocks in one launch, as `fit` asks for it, or `fit_many` for several models."""
    torch.set_float32_matmul_precision(precision)
    weights = [torch.zeros(n_out, n_in) for n_in, n_out in itertools.pairwise(widths)]
    biases = [torch.zeros(n_out) for n_out in widths[1:]]
    velocities = [[torch.zeros_like(t) if full else None for t in tensors] for tensors in (weights, biases)]
    code, momentum = losses.code("mse"), 0.9 if full else 0.0
    x = torch.zeros(batch, widths[0], dtype=x_dtype)
    tiles = kernels.blocks_tiles(list(widths), batch, code, full, 1.0, x)
    schedule = torch.tensor([[0, batch, layer, layer] for layer in range(2)])
    call = (
        weights, biases, x, torch.zeros(batch, widths[-1]), torch.arange(batch), schedule, batch,
        LEAKY * 2, code, torch.zeros(2), *velocities, momentum, full, 1 / 255 if x_dtype == torch.uint8 else 1.0, full, False,
        cycle, tiles,
    )  # fmt: skip
    kernels.sngd_blocks_([call] * models)


def resources(cubin: bytes, folder: str, persistent: bool) -> dict[str, int]:
    """Of the one kernel in a cubin: registers a thread, bytes of stack, and how often its loops go to the stack.

    Of a persistent one that is how often a step does: the loop over its steps is the longest, and others are run once a launch.
    Its instructions and, of them, the multiply-adds are counted, too, those of loops in a step once.
    """
    path = Path(folder) / "kernel.cubin"
    path.write_bytes(cubin)

    def dump(what: str) -> str:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, what, path], check=True, capture_output=True, text=True).stdout

    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage")).groups())
    found = {"registers": registers, "stack": stack, "spills": 0, "instructions": 0, "multiply_adds": 0}
    if stack or persistent:
        in_loops = instructions_in_loops(dump("-sass"), persistent)
        found["spills"] = sum(name in ("STL", "LDL") for name in in_loops)
        if persistent:
            found |= {"instructions": len(in_loops), "multiply_adds": in_loops.count("FFMA")}
    return found


def instructions_in_loops(sass: str, only_the_longest: bool = False) -> list[str]:
    """The instructions' names between a backward branch and its target."""
    names, loops = [], []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass):
        at, target = int(address, 16), re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        names.append((at, re.match(r"(?:@\S+\s+)?(\w+)", text)[1]))
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    if only_the_longest:
        loops = sorted(loops, key=lambda loop: loop[1] - loop[0])[-1:]
    return [name for at, name in names if any(first <= at <= last for first, last in loops)]


def barriers(constexprs: dict) -> int:
    """How many grid barriers a step of this specialization has by its docstring."""
    if "SPLIT_OUT" not in constexprs:
        return 0
    units, inputs = constexprs["SPLIT_OUT"] > 1, constexprs["SPLIT_IN"] > 1
    if constexprs.get("p_last_weight", 0) is not None:
        return 2 * inputs + 3 * (units or inputs)
    if not constexprs["ONE_TILE"]:
        return inputs + 2 * (units or inputs) + (constexprs["RELATIVE"] and (units or inputs))
    if constexprs["ONE_BARRIER"]:
        return 2  # one of them only where the Gram norm cannot be trusted
    has_next = constexprs.get("p_next_weight", 0) is not None
    return inputs + (units and has_next) + (units or inputs) + (constexprs["RELATIVE"] and (units or inputs))


def barriers_of_a_program(constexprs: dict) -> int:
    """How many barriers of its own threads a program has: two at a grid barrier, one where no other program is waited for."""
    if "SPLIT_OUT" not in constexprs:
        return 0
    if constexprs["ONE_TILE"]:
        return 2 * barriers(constexprs)
    single, alone = constexprs["SPLIT_IN"] == 1, constexprs["SPLIT_OUT"] * constexprs["SPLIT_IN"] == 1
    deep, kept = constexprs.get("p_last_weight", 0) is not None, constexprs.get("p_velocity_weight", 0) is not None
    # Where D has been stored, unless there is a grid barrier for that; where it has been read; where a kept velocity is read.
    rest = (not deep) + alone + (kept and constexprs["PARTS"] > 1)
    return 2 * barriers(constexprs) + (1 + deep) * (single + alone) + rest


def for_hopper_alone(label: str, constexprs: dict) -> bool:
    """Whether the plan chooses a specialization for no other capability: large tiles, and those for matrix units."""
    return label.startswith("persistent") and (constexprs["PRECISION"] != "ieee" or constexprs["PARTS"] > 1)


def compile_one(capability, label, kernel, signature, constexprs, attributes, options, folder) -> dict:
    """One specialization compiled for one compute capability."""
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    return {
        "kernel": label,
        "capability": capability,
        **resources(compiled.asm["cubin"], folder, label.startswith("persistent")),
        "warps": options["num_warps"],
        "shared": compiled.metadata.shared,
        "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
        "fma": len(re.findall(r"\bfma\.rn", ptx)) + len(re.findall(r"\bfma\.rn\.f32x2", ptx)),  # two in one
        "rounded_additions": len(re.findall(r"arith\.addf [^:]*%arg\d+[^:]*: tensor<[^,]*, #(?:mma|linear)", ttgir)),
        "trap": len(re.findall(r"\btrap;", ptx)),
        "acquires": len(re.findall(r"\bld\.[\w.]*acquire|\batom\.[\w.]*acquire", ptx)),
        "releases": len(re.findall(r"\b(?:atom|red)\.[\w.]*release", ptx)),
        "barriers": barriers(constexprs),
        "own_barriers": len(re.findall(r"\b(?:gpu|ttg)\.barrier\b", compiled.asm["ttir"])),
        "own_barriers_claimed": barriers_of_a_program(constexprs),
        "constants": {k: v for k, v in constexprs.items() if type(v) in (int, bool, str)},
        "specialization": repr((signature, {k: v for k, v in constexprs.items() if not k.isupper()}, options)),
    }


def main() -> None:
    """Collect, compile, print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument(
        "--all-tiles", action="store_true", help="of the persistent plan, not only those that the model chooses"
    )
    given = parser.parse_args()
    capabilities = given.capability or CAPABILITIES
    collector = Collector()
    launcher.launch = collector.launch
    kernels._most_programs = lambda tensor: 132  # as on an H200
    persistent = [case for case in CASES if serves(*case)] + PERSISTENT_CASES
    named = (("fused", CASES), ("persistent", persistent), ("streamed", STREAMED_CASES), ("library", LIBRARY_CASES))
    for name, cases in named:
        os.environ[plan.ENVIRONMENT_VARIABLE] = name
        for case in cases:
            run_case(*case)
    os.environ[plan.ENVIRONMENT_VARIABLE] = "auto"
    for blocks_case in BLOCKS_CASES:
        run_blocks(*blocks_case)
    os.environ[plan.ENVIRONMENT_VARIABLE] = "persistent"
    matrix, plan.MATRIX, plan.MATRIX_WIDE = (plan.MATRIX, plan.MATRIX_WIDE), (), ()
    plan.choose.cache_clear()
    for case in persistent:  # those of the form with one barrier, which has to be faster than other tiles for matrix units
        if case[4] != "highest":
            run_case(*case)
    plan.MATRIX, plan.MATRIX_WIDE = matrix
    if given.all_tiles:
        chosen = {*collector.found}
        run_all_tiles()
        for key in {*collector.found} - chosen:
            collector.found[key] = (collector.found[key][0] + NOT_CHOSEN, *collector.found[key][1:])
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        found = [
            compile_one(capability, *entry, folder)
            for capability in capabilities
            for entry in collector.found.values()
            if capability == 90 or not for_hopper_alone(entry[0], entry[3])
        ]
        print(json.dumps(found))


if __name__ == "__main__":
    main()
