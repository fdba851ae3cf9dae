"""Sweeps over one row of logits, compiled with numba, for the CPU kernels.

Reading. A row is a 1-D contiguous slice of the storage. Its elements are float32, or the raw bits of bfloat16
(as int16) or float16 (as uint16), which numba has no arithmetic for; `to_float32` widens them in a register.

Ordering. A floating-point maximum is not vectorized without fast-math flags that make NaN and infinity
undefined. `order_key` maps a float to an int32 with the same order, whose maximum is. NaN gets the largest
key and -0.0 the key of 0.0, so "first element that has the largest key" is `torch.argmax`: the first NaN if
there is one, else the lowest index of the maximum.

Softmax. numba has no vector exp without Intel's SVML, so `exp_nonpositive` is 2**n times a polynomial, built
from operations that LLVM vectorizes. `softmax_stats` is the online softmax (Milakov and Gimelshein, *Online
normalizer calculation for softmax*, arXiv 1805.02867) in blocks that stay in the L1 cache: memory is read
once for the maximum, the normalizer s = sum e^(z - m) and t = sum e^(z - m) (z - m), from which the entropy
is log s - t / s. When a block raises the maximum by d, s becomes s e^-d and t becomes e^-d (t - d s). Sums
run in float32 lanes inside a block and in float64 between blocks.
"""

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_aasd.kernels.common.compiled import compiled

# Elements of a row that are processed together: 8 KiB at most, which stay in the L1 cache for a second sweep.
BLOCK = 2048
NAN_KEY = np.int32(2**31 - 1)
LOWEST_KEY = np.int32(-(2**31))
_LOG2_E = np.float32(math.log2(math.e))
# Below 2**-126 a float32 is subnormal: such a weight counts as 0.
_MIN_EXPONENT = np.float32(-126.0)
# 2**f = 1 + f (C1 + f (C2 + ...)) on [-1/2, 1/2], relative error 2e-9 before rounding; exactly 1 at f = 0.
_C1, _C2, _C3, _C4, _C5, _C6 = (
    np.float32(c) for c in (0.69314718246, 0.24022647738, 0.05550332367, 0.00961843692, 0.00133988750, 0.00015353361)
)


@intrinsic
def to_float32(typing_context: Any, raw: types.Type) -> Any:
    """Widen float32, bfloat16 bits (int16) or float16 bits (uint16) to float32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        (value,) = args
        if raw == types.float32:
            return value
        if raw == types.int16:
            bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())
        return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())

    if raw in (types.float32, types.int16, types.uint16):
        return types.float32(raw), codegen
    return None


@intrinsic
def order_key(typing_context: Any, value: types.Type) -> Any:
    """Map a float32 to an int32 of the same order; -0.0 as 0.0, NaN above everything."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        int32 = ir.IntType(32)
        value = builder.fadd(args[0], ir.Constant(ir.FloatType(), 0.0))
        bits = builder.bitcast(value, int32)
        sign = builder.ashr(bits, ir.Constant(int32, 31))
        key = builder.xor(bits, builder.and_(sign, ir.Constant(int32, 0x7FFFFFFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.select(is_nan, ir.Constant(int32, int(NAN_KEY)), key)

    return types.int32(types.float32), codegen


@intrinsic
def key_value(typing_context: Any, key: types.Type) -> Any:
    """Return the float32 that `order_key` mapped to this int32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        int32 = ir.IntType(32)
        sign = builder.ashr(args[0], ir.Constant(int32, 31))
        bits = builder.xor(args[0], builder.and_(sign, ir.Constant(int32, 0x7FFFFFFF)))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _truncate(typing_context: Any, value: types.Type) -> Any:
    """Round a float32 to int32 towards zero (numba's own cast goes through int64)."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.fptosi(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _power_of_two(typing_context: Any, exponent: types.Type) -> Any:
    """Return 2.0**exponent as float32 for an int32 exponent in [-126, 127]."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        int32 = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(int32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(int32, 23)), ir.FloatType())

    return types.float32(types.int32), codegen


@compiled
def exp_nonpositive(x):
    """Return e**x as float32 for a float32 x <= 0: exactly 1 at 0, and 0 from about -87.3 down to -inf."""
    scaled = x * _LOG2_E
    clamped = scaled if scaled > _MIN_EXPONENT else _MIN_EXPONENT
    whole = _truncate(clamped - np.float32(0.5))
    f = clamped - np.float32(whole)
    series = _C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6))))
    power = (np.float32(1.0) + f * series) * _power_of_two(whole)
    return power if scaled > _MIN_EXPONENT else np.float32(0.0)


@compiled
def max_key(block):
    """Return the largest `order_key` of a block."""
    largest = LOWEST_KEY
    for i in range(block.size):
        key = order_key(to_float32(block[i]))
        largest = key if key > largest else largest
    return largest


@compiled
def first_with_key(block, key):
    """Return the lowest index in a block whose element has this `order_key`."""
    for i in range(block.size):
        if order_key(to_float32(block[i])) == key:
            return i
    return 0


@compiled
def row_max(row):
    """Return (maximum as float32, lowest index that holds it); NaN and its first index if there is one."""
    largest = LOWEST_KEY
    start_of_largest = 0
    for start in range(0, row.size, BLOCK):
        key = max_key(row[start : start + BLOCK])
        if key > largest:
            largest = key
            start_of_largest = start
    return key_value(largest), start_of_largest + first_with_key(row[start_of_largest:], largest)


@compiled
def top_three(row):
    """Return the three largest elements as float32, largest first, -inf where there are fewer; the row has no NaN."""
    first, second, third = np.float32(-np.inf), np.float32(-np.inf), np.float32(-np.inf)
    for start in range(0, row.size, BLOCK):
        block = row[start : start + BLOCK]
        if key_value(max_key(block)) <= third:
            continue
        for i in range(block.size):
            value = to_float32(block[i])
            if value > third:
                third = value
                if value > second:
                    second, third = value, second
                if value > first:
                    first, second = value, first
    return first, second, third


@compiled(reassociate=True)
def block_sums(block, maximum):
    """Return (sum e**(z - maximum), sum e**(z - maximum) (z - maximum)) of a block, in float32 lanes."""
    total = np.float32(0.0)
    weighted = np.float32(0.0)
    for i in range(block.size):
        distance = to_float32(block[i]) - maximum
        weight = exp_nonpositive(distance)
        total += weight
        # A weight of 0 may stand at a distance of -inf, and 0 * inf is NaN.
        weighted += weight * distance if weight > np.float32(0.0) else np.float32(0.0)
    return total, weighted


@compiled
def absorb(block, key, maximum, s, t):
    """Return the online softmax's (maximum, s, t) with a block added, whose largest key is `key`.

    The state starts as (-inf, 0, 0). Once the maximum is NaN or +inf the sums mean nothing.
    """
    raised = key_value(key)
    if key > order_key(maximum):
        if s > 0.0:
            distance = np.float64(maximum) - np.float64(raised)
            shrink = math.exp(distance)
            t = shrink * (t + distance * s) if shrink > 0.0 else 0.0
            s *= shrink
        maximum = raised
    if np.isfinite(maximum):
        total, weighted = block_sums(block, maximum)
        s += total
        t += weighted
    return maximum, s, t


@compiled
def softmax_stats(row):
    """Return (maximum, its lowest index, s, t) of a row in one sweep; see the module's docstring.

    s is 0 when the row has no softmax: it holds NaN or +inf, or nothing but -inf.
    """
    largest = LOWEST_KEY
    start_of_largest = 0
    maximum = np.float32(-np.inf)
    s = 0.0
    t = 0.0
    for start in range(0, row.size, BLOCK):
        block = row[start : start + BLOCK]
        key = max_key(block)
        if key > largest:
            largest = key
            start_of_largest = start
        maximum, s, t = absorb(block, key, maximum, s, t)
    if not np.isfinite(maximum):
        s = 0.0
    return maximum, start_of_largest + first_with_key(row[start_of_largest:], largest), s, t


def flat_view(logits: torch.Tensor) -> tuple[np.ndarray, int]:
    """Return the 1-D numpy view over a 2-D tensor's storage from its first row on, and its row stride.

    Half-precision elements come as raw bits, int16 for bfloat16 and uint16 for float16. Rows of any stride
    are then contiguous slices, so one compiled version serves all strides.
    """
    rows, width = logits.shape
    stride = logits.stride(0) if rows > 1 else width
    size = (rows - 1) * stride + width if rows else 0
    flat = logits.as_strided((size,), (1,))
    if logits.dtype == torch.float32:
        return flat.numpy(), stride
    bits = flat.view(torch.int16).numpy()
    return (bits if logits.dtype == torch.bfloat16 else bits.view(np.uint16)), stride
