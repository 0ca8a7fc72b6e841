"""Compile the fused kernels for an H100 at XL/2's sizes, for which no GPU is needed; prints a line for each.

A program of its own, since Triton decides when a kernel is imported whether to interpret or to compile it.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sprint.kernels import modulation, rotary

WIDE = {"C": 1152, "BLOCK": 2048, "WIDE": tl.float32}
HEADS = {"H": 16, "D": 72, "HEADS": 16, "WIDTH": 128, "WIDE": tl.float32}
FLOATS = dict.fromkeys(("stats", "sums", "q_weight", "k_weight", "rope"), "*fp32") | {"eps": "fp32"}


def compile_for_h100(kernel, constants, warps):
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        integer = name.endswith("stride") or name in ("tokens", "share", "count")
        signature[name] = "constexpr" if name in constants else FLOATS.get(name, "i32" if integer else "*bf16")
        if name not in constants and name != "eps":
            attributes[i,] = [["tt.divisibility", 16]]  # as a launch finds tensors and sizes of a model
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm


for kernel, constants, warps in (
    (modulation._forward, {**WIDE, "GATED": False}, 4),
    (modulation._forward, {**WIDE, "GATED": True}, 4),
    (modulation._backward, {**WIDE, "GATED": False}, 8),
    (modulation._backward, {**WIDE, "GATED": True}, 8),
    (rotary._forward, HEADS, 8),
    (rotary._backward, HEADS, 8),
):
    asm = compile_for_h100(kernel, constants, warps)
    moves = [line for line in asm["ptx"].splitlines() if "ld.global" in line or "st.global" in line]
    assert asm["cubin"]
    assert not any(".b16" in move for move in moves), moves  # bfloat16 moves in vectors of 16 bytes, not one by one
    assert any("ld.global.v4.b32" in move for move in moves)
    assert any("st.global.v4.b32" in move for move in moves)
    print(f"compiled {kernel.__module__}.{kernel.__name__}")
