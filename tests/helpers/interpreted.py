"""Triton's kernels on a CPU: what its interpreter needs put right, for processes of their own.

Import it before anything that imports triton: whether kernels are interpreted is read then.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it is, without the warning

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter


def widen(bits: Any) -> Any:
    """The float32 values that the bits of bfloat16 ones stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> Any:
    """The bits of the bfloat16 values next to finite float32 ones, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def replace(owner: object, **values: object) -> None:
    """Put other values for attributes of a class or a module."""
    for name, value in values.items():
        setattr(owner, name, value)


def put_bfloat16_right() -> None:
    """The interpreter computes with the bits of bfloat16 values, and rounds by cutting off.

    It also leaves products to a library that may add up a row in another order where it lies
    elsewhere, which tensor cores do not.
    """
    convert, combine = interpreter._convert_float, interpreter.InterpreterBuilder.binary_op

    def exact(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return widen(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrow(data)
        return convert(data, source, target, rounding)

    def combine_wide(self: Any, one: Any, other: Any, operation: Any) -> Any:
        if one.dtype.scalar != tl.bfloat16:
            return combine(self, one, other, operation)
        result = operation(widen(one.data), widen(other.data))
        if result.dtype == np.bool_:  # a comparison
            return interpreter.TensorHandle(result, tl.int1)
        return interpreter.TensorHandle(narrow(result), tl.bfloat16)

    def multiply(_: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        one, other = (widen(x.data) if x.dtype == tl.bfloat16 else x.data for x in (a, b))
        product = (one[:, :, None].astype(np.float32) * other[None]).sum(1)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    interpreter._convert_float = exact
    replace(interpreter.InterpreterBuilder, create_dot=multiply, binary_op=combine_wide)


def let_floats_be_tensors() -> None:
    """Compiled kernels see a Python float argument as a tensor, and may cast it."""
    convert = interpreter._implicit_cvt

    def to_tensor(value: Any) -> Any:
        if type(value) is not float:
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = to_tensor


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


def replace_device_functions() -> None:
    """What kernels call of CUDA's device library, which exists as machine code alone."""
    for library in (libdevice, cuda_libdevice):
        replace(library, rsqrt=_rsqrt, exp=_exp, tanh=_tanh)


put_bfloat16_right()
let_floats_be_tensors()
replace_device_functions()
