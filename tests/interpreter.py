"""Triton's interpreter, made to run what the tests run; tests/conftest.py turns it on where there is no GPU.

Its arithmetic takes the bit patterns of bfloat16 operands as integers. Here they are widened first, which is exact, and what
is made of them by anything but a `tl.dot` is rounded to the nearest.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_dot = interpreter.InterpreterBuilder.create_dot


def _widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _exact_dot(self, a, b, d, *options):
    return _dot(self, _widened(a), _widened(b), d, *options)


def _rounded(operation):
    """An operation of two operands, of bfloat16 ones as a GPU computes it."""

    def compute(self, lhs, rhs):
        if lhs.dtype.scalar != tl.bfloat16:
            return operation(self, lhs, rhs)
        made = operation(self, _widened(lhs), _widened(rhs)).data
        bits = torch.from_numpy(np.ascontiguousarray(made)).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits.reshape(made.shape), tl.bfloat16)

    return compute


interpreter.InterpreterBuilder.create_dot = _exact_dot
for _name in ("create_fadd", "create_fsub", "create_fmul"):
    setattr(interpreter.InterpreterBuilder, _name, _rounded(getattr(interpreter.InterpreterBuilder, _name)))
