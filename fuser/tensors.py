"""Between constants and torch tensors: weights of a module held as they are, any constant as a tensor."""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fuser.constants import Array, Constant, Joined, Transposed
from fuser.dtypes import DType
from fuser.errors import InputError, UnsupportedOperator

FLOATS8 = {torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn)}


@dataclass(eq=False)
class Held(Constant):
    """A parameter or buffer of a module: the tensor itself, never copied. On `meta`, or fake, it has no elements."""

    tensor: torch.Tensor
    name: str = ""

    def __post_init__(self) -> None:
        self.dtype = DType(str(self.tensor.dtype).removeprefix("torch."))
        self.shape = tuple(self.tensor.shape)

    @property
    def is_known(self) -> bool:
        return not (self.tensor.is_meta or isinstance(self.tensor, FakeTensor))

    def rows(self, start: int, stop: int) -> np.ndarray:
        if not self.is_known:
            raise InputError(f"weight '{self.name}' has no elements: it is on the meta device")
        part = self.tensor[start:stop] if self.shape else self.tensor.reshape(1)
        return to_array(part)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's elements in numpy, bfloat16 included; shared with the tensor where it lies on the CPU in C order."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        array: np.ndarray = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array
    if tensor.dtype in FLOATS8:
        eights: np.ndarray = tensor.view(torch.uint8).numpy().view(FLOATS8[tensor.dtype])
        return eights
    found: np.ndarray = tensor.numpy()
    return found


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A torch tensor of a numpy array's elements; bfloat16 included."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16).copy()).view(torch.bfloat16)
    for dtype, kind in FLOATS8.items():
        if array.dtype == kind:
            return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).copy()).view(dtype)
    try:
        return torch.from_numpy(np.array(array))
    except TypeError:
        raise UnsupportedOperator(f"a constant of {array.dtype} cannot be computed with") from None


def to_constant(tensor: torch.Tensor) -> Constant:
    """An in-memory constant of a tensor's elements."""
    return Array(to_array(tensor), DType(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))


def tensor_of(constant: Constant, stored: Callable[[Constant], torch.Tensor] | None = None) -> torch.Tensor:
    """A constant as a tensor: a module's weight is that weight, a transposed one a view of it.

    Args:
        stored: how a constant that is computed from no other becomes a tensor; by default `Held` ones as they are, and
            others in a copy on the CPU.
    """
    if isinstance(constant, Transposed):
        return tensor_of(constant.base, stored).T
    if isinstance(constant, Joined):
        return torch.cat([tensor_of(part, stored) for part in constant.parts], dim=-1)
    if stored is not None:
        return stored(constant)
    return constant.tensor.detach() if isinstance(constant, Held) else to_tensor(constant.numpy())
