"""Lazy constant data: a weight is read when a rewrite changes it or when it is written out, and not before.

A `Constant` knows its dtype and shape at once and its elements on demand, by rows, so that a tensor larger than
the memory one cares to spend can still be transposed, merged and written in blocks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from fuser.dtypes import DType
from fuser.errors import InputError

BLOCK_BYTES = 64 << 20


class Constant(ABC):
    """The data of a constant value. `shape` is all ints."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes the elements take in a file."""
        return (self.size * self.dtype.bits + 7) // 8

    @property
    def stored_bytes(self) -> int:
        """Bytes of what it is made of: fewer than its elements take where it is quantized."""
        return sum(constant.stored_bytes for constant in self.inner) if self.inner else self.nbytes

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Elements `[start:stop]` along the first axis (a scalar counts as one row)."""

    def numpy(self) -> np.ndarray:
        """All elements."""
        return self.rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)

    @property
    def inner(self) -> "tuple[Constant, ...]":
        """The constants this one is computed from; none when it is stored."""
        return ()

    @property
    def key(self) -> Hashable:
        """What identifies the data: two constants derived alike from the same stored ones have equal keys."""
        return (type(self), *(constant.key for constant in self.inner)) if self.inner else id(self)

    @property
    def is_known(self) -> bool:
        """Whether it has elements: what a model without its weights declares has only dtype and shape."""
        return all(constant.is_known for constant in self.inner)

    def leaves(self) -> "list[Constant]":
        """The stored constants this one is computed from in the end; itself when it is stored."""
        return [leaf for constant in self.inner for leaf in constant.leaves()] if self.inner else [self]

    def rebuild(self, leaf: "Callable[[Constant], np.ndarray]") -> np.ndarray:
        """The elements, computed from `leaf(c)` in place of each stored constant `c`."""
        return leaf(self)

    def blocks(self) -> Iterator[bytes]:
        """The raw little-endian bytes in C order, in pieces of about BLOCK_BYTES."""
        if not self.shape:
            yield _raw(self.rows(0, 1), self.dtype)
            return
        rows = self.shape[0]
        step = max(1, BLOCK_BYTES * rows // max(1, self.nbytes))
        step += step % 2 if self.dtype.bits == 4 else 0  # an odd number of elements ends in the middle of a byte
        for start in range(0, rows, step):
            yield _raw(self.rows(start, min(rows, start + step)), self.dtype)

    @cached_property
    def scalar(self) -> float | None:
        """The one number this constant holds (all elements equal and at most 64 of them), else None."""
        if not 0 < self.size <= 64 or self.dtype is DType.STRING or not self.is_known:
            return None
        with np.errstate(invalid="ignore"):  # a signalling NaN is not equal to itself, like any other
            elements = self.numpy().astype(np.float64).reshape(-1)
        return float(elements[0]) if (elements == elements[0]).all() else None


def _raw(array: np.ndarray, dtype: DType) -> bytes:
    array = np.ascontiguousarray(array, dtype=dtype.numpy)
    if dtype.bits != 4:
        return array.tobytes()
    codes = array.reshape(-1).view(np.uint8) & 15  # numpy keeps each in a byte; in a file the first of two is low
    pairs = np.append(codes, np.zeros(codes.size % 2, np.uint8)).reshape(-1, 2)
    packed: np.ndarray = pairs[:, 0] | pairs[:, 1] << 4
    return packed.tobytes()


@dataclass(eq=False)
class Array(Constant):
    """A constant held in memory."""

    array: np.ndarray
    dtype: DType
    shape: tuple[int, ...]

    @classmethod
    def of(cls, data: object, dtype: DType) -> "Array":
        array = np.asarray(data, dtype=dtype.numpy)
        return cls(array, dtype, tuple(array.shape))

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop] if self.shape else self.array.reshape(1)


@dataclass(eq=False)
class Outline(Constant):
    """What is left of a constant whose elements are not kept: its dtype, its shape and the bytes that it took."""

    dtype: DType
    shape: tuple[int, ...]
    took_bytes: int

    @property
    def is_known(self) -> bool:
        return False

    @property
    def stored_bytes(self) -> int:
        return self.took_bytes

    def rows(self, start: int, stop: int) -> np.ndarray:
        raise InputError(f"the elements of a constant of shape {list(self.shape)} are not kept")


@dataclass(eq=False)
class Proto(Constant):
    """A constant that came inside the ONNX file, decoded on demand."""

    proto: onnx.TensorProto
    dtype: DType
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        array: np.ndarray = onnx.numpy_helper.to_array(self.proto)
        return array[start:stop] if self.shape else array.reshape(1)

    def blocks(self) -> Iterator[bytes]:
        if self.proto.HasField("raw_data"):
            yield self.proto.raw_data
        elif self.dtype.bits == 4:
            yield np.asarray(self.proto.int32_data, np.uint8).tobytes()
        else:
            yield from super().blocks()


@dataclass(eq=False)
class Stored(Constant):
    """A constant in a file beside the model: `nbytes` bytes from `offset` of `path`."""

    path: Path
    offset: int
    dtype: DType
    shape: tuple[int, ...]

    def _read(self, start_bytes: int, count_bytes: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + start_bytes)
                data = file.read(count_bytes)
        except OSError as error:
            raise InputError(f"external data '{self.path}' can no longer be read: {error.strerror}") from None
        if len(data) != count_bytes:
            raise InputError(f"external data '{self.path}' has become shorter while it was read")
        return data

    def rows(self, start: int, stop: int) -> np.ndarray:
        if self.dtype.bits == 4:
            proto = onnx.TensorProto(data_type=self.dtype.onnx, dims=self.shape, raw_data=self._read(0, self.nbytes))
            whole: np.ndarray = onnx.numpy_helper.to_array(proto)
            return whole[start:stop]
        row_bytes = self.nbytes // max(1, self.shape[0]) if self.shape else self.nbytes
        data = self._read(start * row_bytes, (stop - start) * row_bytes)
        return np.frombuffer(data, self.dtype.numpy).reshape((stop - start, *self.shape[1:]))

    def blocks(self) -> Iterator[bytes]:
        for start in range(0, self.nbytes, BLOCK_BYTES):
            yield self._read(start, min(BLOCK_BYTES, self.nbytes - start))


@dataclass(eq=False)
class Transposed(Constant):
    """The matrix `base` [M, N] read as [N, M]."""

    base: Constant

    def __post_init__(self) -> None:
        self.dtype, self.shape = self.base.dtype, (self.base.shape[1], self.base.shape[0])

    def rows(self, start: int, stop: int) -> np.ndarray:
        height = self.base.shape[0]
        out = np.empty((stop - start, height), self.dtype.numpy)
        step = max(1, BLOCK_BYTES * height // max(1, self.base.nbytes))
        for top in range(0, height, step):
            bottom = min(height, top + step)
            out[:, top:bottom] = self.base.rows(top, bottom)[:, start:stop].T
        return out

    @property
    def inner(self) -> tuple[Constant, ...]:
        return (self.base,)

    def rebuild(self, leaf: Callable[[Constant], np.ndarray]) -> np.ndarray:
        return self.base.rebuild(leaf).T


@dataclass(eq=False)
class Joined(Constant):
    """`parts` concatenated along their last axis: merged projections [D, N1 + N2 + ...], or their biases."""

    parts: tuple[Constant, ...]

    def __post_init__(self) -> None:
        first = self.parts[0]
        self.dtype = first.dtype
        self.shape = (*first.shape[:-1], sum(part.shape[-1] for part in self.parts))

    def rows(self, start: int, stop: int) -> np.ndarray:
        if len(self.shape) == 1:
            return np.concatenate([part.numpy() for part in self.parts])[start:stop]
        return np.concatenate([part.rows(start, stop) for part in self.parts], axis=-1)

    @property
    def inner(self) -> tuple[Constant, ...]:
        return self.parts

    def rebuild(self, leaf: Callable[[Constant], np.ndarray]) -> np.ndarray:
        return np.concatenate([part.rebuild(leaf) for part in self.parts], axis=-1)
