"""Element types: ONNX's, under the names torch and numpy use."""

from enum import StrEnum
from functools import cached_property

import ml_dtypes
import numpy as np
import onnx
import torch

_NUMPY = {
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "string": object,
}


class DType(StrEnum):
    """One element type; its text is the name."""

    FLOAT32 = "float32"
    UINT8 = "uint8"
    INT8 = "int8"
    UINT16 = "uint16"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    STRING = "string"
    BOOL = "bool"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    UINT32 = "uint32"
    UINT64 = "uint64"
    COMPLEX64 = "complex64"
    COMPLEX128 = "complex128"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E4M3FNUZ = "float8_e4m3fnuz"
    FLOAT8_E5M2 = "float8_e5m2"
    FLOAT8_E5M2FNUZ = "float8_e5m2fnuz"
    UINT4 = "uint4"
    INT4 = "int4"
    OTHER = "other"  # a newer type than this table: carried, never computed with

    @classmethod
    def from_onnx(cls, code: int) -> "DType":
        """The type behind a TensorProto.DataType code."""
        return _BY_CODE.get(code, cls.OTHER)

    @cached_property
    def onnx(self) -> int:
        """The TensorProto.DataType code."""
        return _CODES[self]

    @cached_property
    def numpy(self) -> np.dtype:
        found: np.dtype = np.dtype(_NUMPY.get(self.value, self.value))
        return found

    @cached_property
    def torch(self) -> torch.dtype:
        """The torch type; AttributeError for types torch lacks."""
        found = getattr(torch, self.value)
        if not isinstance(found, torch.dtype):
            raise AttributeError(self.value)
        return found

    @property
    def is_float(self) -> bool:
        return self.value.startswith(("float", "bfloat"))

    @property
    def is_integer(self) -> bool:
        return self.value.startswith(("int", "uint"))

    @cached_property
    def bits(self) -> int:
        """Bits an element takes in a file; 0 where that is not fixed (strings)."""
        if self in (DType.INT4, DType.UINT4):
            return 4
        return 0 if self in (DType.STRING, DType.OTHER) else self.numpy.itemsize * 8


_CODES = {
    DType.FLOAT32: 1, DType.UINT8: 2, DType.INT8: 3, DType.UINT16: 4, DType.INT16: 5, DType.INT32: 6, DType.INT64: 7,
    DType.STRING: 8, DType.BOOL: 9, DType.FLOAT16: 10, DType.FLOAT64: 11, DType.UINT32: 12, DType.UINT64: 13,
    DType.COMPLEX64: 14, DType.COMPLEX128: 15, DType.BFLOAT16: 16, DType.FLOAT8_E4M3FN: 17,
    DType.FLOAT8_E4M3FNUZ: 18, DType.FLOAT8_E5M2: 19, DType.FLOAT8_E5M2FNUZ: 20, DType.UINT4: 21, DType.INT4: 22,
}  # fmt: skip
_BY_CODE = {code: dtype for dtype, code in _CODES.items()}

MAX_OPSET = onnx.defs.onnx_opset_version()
