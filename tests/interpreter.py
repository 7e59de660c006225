"""Triton's interpreter, made to run what the tests run; tests/conftest.py turns it on where there is no GPU.

Its `tl.dot` multiplies the bit patterns of bfloat16 operands as integers. Here they are widened first, which is exact.
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


interpreter.InterpreterBuilder.create_dot = _exact_dot
