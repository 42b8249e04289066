"""Our dequantizers against the gguf package's, on random blocks, bit for bit.

Why equality is the right demand: a scale has 11 bits of mantissa (f16), a second scale at most 8,
a quantized value at most 8, so the products are exact in f32's 24 bits, and what is left is one
addition or, for Q6_K, one product, which both sides round once.
"""
import os
import subprocess

import numpy
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES

TYPES = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q6_K]
TOOL = os.path.join(os.environ.get("KVT_BUILD", "build/release"), "tests/unit/dequant_tool")
BLOCKS = 4096


def finite_halves(blocks, offset):
    """Scales that are infinite or NaN have no value to compare: give them a finite exponent."""
    high = blocks[:, offset + 1]
    high[(high & 0x7C) == 0x7C] &= 0xBF


def random_blocks(kind):
    values, size = GGML_QUANT_SIZES[kind]
    rng = numpy.random.default_rng(20 + int(kind))
    if kind in (Type.F32, Type.F16, Type.BF16):
        numbers = rng.normal(size=BLOCKS).astype(numpy.float32)
        numbers[:4] = [0.0, -0.0, 6e-8, -65504.0]
        if kind == Type.F32:
            return numbers.view(numpy.uint8).reshape(-1, 4)
        if kind == Type.F16:
            return numbers.astype(numpy.float16).view(numpy.uint8).reshape(-1, 2)
        return (numbers.view(numpy.uint32) >> 16).astype(numpy.uint16).view(numpy.uint8).reshape(-1, 2)
    blocks = rng.integers(0, 256, size=(BLOCKS, size), dtype=numpy.uint8)
    for offset in {Type.Q4_1: (0, 2), Type.Q4_K: (0, 2), Type.Q6_K: (208,)}.get(kind, (0,)):
        finite_halves(blocks, offset)
    return blocks


@pytest.mark.parametrize("path", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_equals_gguf_package(kind, path):
    blocks = random_blocks(kind)
    done = subprocess.run([TOOL, str(int(kind)), path], input=blocks.tobytes(),
                          stdout=subprocess.PIPE, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip(f"this CPU has no {path}")
    assert done.returncode == 0
    ours = numpy.frombuffer(done.stdout, dtype=numpy.uint32)
    reference = quants.dequantize(blocks.copy(), kind).astype(numpy.float32).reshape(-1)
    theirs = reference.view(numpy.uint32)
    assert ours.size == theirs.size == BLOCKS * GGML_QUANT_SIZES[kind][0]
    # +0 and -0 are one value: 0 * -d + 0 may come out as either
    differ = (ours != theirs) & ~((ours | theirs) == 0x80000000)
    assert not differ.any(), f"{differ.sum()} of {ours.size} values differ"
