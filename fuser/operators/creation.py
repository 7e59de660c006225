"""Constants, ranges and casts: the operators that choose their own dtype."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuser.dtypes import DType
from fuser.errors import FuserError, UnsupportedOperator
from fuser.operators.table import Ints, ints, operator, same_dtype

# onnx.TensorProto.DataType, without strings, complex numbers, float8 and the dtypes of fewer than 8 bits.
_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    16: torch.bfloat16,
}


def dtype_of(code: int, float_dtype: torch.dtype | None = None) -> torch.dtype:
    """The torch dtype of an ONNX data type code, or `float_dtype` in place of a floating one."""
    if code not in _DTYPES:
        raise UnsupportedOperator(f"ONNX data type {code} has no dtype here")
    return _floating(_DTYPES[code], float_dtype)


def tensor_of(value: Any) -> Tensor:
    """A tensor attribute, given as a torch.Tensor or a numpy array (bfloat16 as ml_dtypes has it)."""
    if isinstance(value, Tensor):
        return value
    array = np.array(value)  # a copy: an array read from a file may not be writable
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UnsupportedOperator(f"numpy dtype {array.dtype} has no dtype here") from error


def _floating(dtype: torch.dtype, float_dtype: torch.dtype | None) -> torch.dtype:
    return float_dtype if float_dtype is not None and dtype.is_floating_point else dtype


@operator("Constant")
def constant(
    *,
    value: Any = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
    float_dtype: torch.dtype | None,
) -> Tensor:
    if value is not None:
        x = tensor_of(value)
        return x.to(_floating(x.dtype, float_dtype))
    for floats in (value_float, value_floats):
        if floats is not None:
            return torch.tensor(floats, dtype=float_dtype or torch.float32)
    for integers in (value_int, value_ints):
        if integers is not None:
            return torch.tensor(integers, dtype=torch.int64)
    raise FuserError("one of value, value_float, value_floats, value_int and value_ints is required")


@operator("ConstantOfShape")
def constant_of_shape(shape: Ints, *, value: Any = None, float_dtype: torch.dtype | None) -> Tensor:
    fill = torch.zeros(1, dtype=torch.float32) if value is None else tensor_of(value)
    return fill.to(_floating(fill.dtype, float_dtype)).reshape(()).expand(ints(shape)).clone()


@operator("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0, float_dtype: torch.dtype | None) -> Tensor:
    rows, columns = x.shape
    chosen = _floating(x.dtype, float_dtype) if dtype is None else dtype_of(dtype, float_dtype)
    i, j = torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
    return (j[None, :] - i[:, None] == k).to(chosen)


@operator("Range")
def arange(
    start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1, float_dtype: torch.dtype | None
) -> Tensor:
    """start + i delta below limit; floats are computed in float64, so any `stash_type` is met, and rounded once."""
    same_dtype(start, limit, delta)
    first, last, step = start.item(), limit.item(), delta.item()
    if start.dtype.is_floating_point:
        count = max(math.ceil((last - first) / step), 0)
        index = torch.arange(count, dtype=torch.float64, device=start.device)
        return (first + index * step).to(_floating(start.dtype, float_dtype))
    count = len(range(int(first), int(last), int(step)))
    return (int(first) + torch.arange(count, device=start.device) * int(step)).to(start.dtype)


def _e4m3(x: Tensor, saturate: int) -> Tensor:
    if not saturate:
        raise UnsupportedOperator("casts to E4M3 that do not saturate are not known")
    most = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-most, most).to(torch.float8_e4m3fn)


@operator("Cast")
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up", float_dtype: torch.dtype | None) -> Tensor:
    """`saturate` and `round_mode` concern float8 targets only, of which the table has E4M3."""
    if to == DType.FLOAT8_E4M3FN.onnx:
        return _e4m3(x, saturate)
    return x.to(dtype_of(to, float_dtype))


@operator("CastLike")
def cast_like(
    x: Tensor, target_type: Tensor, *, saturate: int = 1, round_mode: str = "up", float_dtype: torch.dtype | None
) -> Tensor:
    if target_type.dtype == torch.float8_e4m3fn:
        return _e4m3(x, saturate)
    return x.to(_floating(target_type.dtype, float_dtype))
