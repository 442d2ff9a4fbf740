"""Compiles every kernel for devices that need not be there, and prints what it takes of them as JSON.

Run without TRITON_INTERPRET: the interpreter accepts what the compiler does not.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradstats.kernels import adam, linear, normalization, rows

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(kernel, types, constants, capability, warps=4, divisible=()):
    """Types of arguments by letter: a pointer's "*fp32", an integer's "i32"; `divisible` by 16 are some of them."""
    names = kernel.arg_names
    assert types.keys() | constants.keys() == set(names)
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name not in constants},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": built.metadata.shared,
        "instructions": sorted(set(re.findall(r"\b(?:wgmma|mma|ld\.global|st\.global)[\w.:]*", built.asm["ptx"]))),
    }


def linear_sums(capability, dtype, tile, odd=False):
    """`odd`: sizes and strides that no 16 divides, as those of 50,257 words."""
    operand = torch.empty(1, 512, 512, dtype=torch.float32 if dtype == "fp32" else torch.half)
    tile = linear.fitted(tile, operand, operand)
    types = dict.fromkeys(("N", "T", "O", "I", "d_n", "d_t", "a_n", "a_t", "share"), "i32")
    types |= {"d": f"*{dtype}", "a": f"*{dtype}", "gradient": f"*{dtype}", "squares": "*fp32", "norms": "*fp32"}
    constants = {"PRECISION": "ieee", "TILE_O": tile.o, "TILE_I": tile.i, "BLOCK_T": tile.t}
    divisible = () if odd else ("d", "a", "gradient", "squares", "T", "O", "I", "d_n", "d_t", "a_n", "a_t")
    return build(linear._sums, types, constants, capability, tile.warps, divisible)


def normalization_backward(capability, features, rows, warps, centered):
    sizes = ("T", "F", "d_n", "d_t", "x_n", "x_t", "share")
    types = dict.fromkeys(sizes, "i32") | dict.fromkeys(("d", "x"), "*bf16") | {"eps": "fp32"}
    types |= dict.fromkeys(("weight", "weights"), "*fp32")
    constants = {"CENTERED": centered, "ROWS": rows, "BLOCK_F": features, "d_f": 1, "x_f": 1}
    if centered:
        types |= {"dx": "*bf16", "biases": "*fp32"}
    else:
        constants |= {"dx": None, "biases": None}
    divisible = ("d", "x", "weight", "dx", "weights", "biases", "F", "d_n", "d_t", "x_n", "x_t")
    return build(normalization._backward, types, constants, capability, warps, divisible)


def row_sums(capability):
    places = dict.fromkeys(("begin", "end"), "*i64")
    blocks = {"BLOCK_P": rows.POSITIONS, "BLOCK_F": rows.FEATURES}
    first = places | {"d": "*bf16", "order": "*i64", "c": "*fp32", "norms": "*fp32", "F": "i32", "d_p": "i32"}
    second = places | {"ids": "*i64", "first": "*i64", "gradient": "*bf16", "F": "i32"}
    second |= {"c": "*fp32", "squares": "*fp32"}
    return {
        "pairs": build(rows._pairs, first, blocks | {"d_f": 1}, capability, divisible=("d", "c", "F", "d_p")),
        "rows": build(rows._rows, second, blocks, capability, divisible=("c", "gradient", "squares", "F")),
    }


def adam_step(capability, dtype, reads, aligned):
    types = dict.fromkeys(("addresses", "sizes", "blocks"), "*i64")
    types |= {"owners": "*i32", "scalars": "*fp64", "TENSORS": "i32"}
    constants = {"TYPE": dtype, "READS": reads, "IS_ALIGNED": aligned, "BLOCK": adam.BLOCK}
    return build(adam._step, types, constants, capability)


def main():
    found = {}
    for capability in (80, 90):
        kernels = {
            "linear bf16": linear_sums(capability, "bf16", linear.LARGE),
            "linear fp32": linear_sums(capability, "fp32", linear.SMALL),
            "linear fp16": linear_sums(capability, "fp16", linear.TALL, odd=True),
            "LayerNorm": normalization_backward(capability, 8192, 1, 16, centered=True),
            "RMSNorm": normalization_backward(capability, 512, 4, 4, centered=False),
            "adam bf16": adam_step(capability, tl.bfloat16, True, True),
            "adam fp32": adam_step(capability, tl.float32, False, False),
        } | row_sums(capability)
        found |= {f"{name} sm_{capability}": usage for name, usage in kernels.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
