"""Quantized weights as ONNX and ONNX Runtime hold them, made lazily from ours.

Source: ONNX's DequantizeLinear; MatMulNBits and MatMulBnb4 in docs/ContribOperators.md of ONNX Runtime.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from fuser.constants import Constant, Joined, Transposed
from fuser.dtypes import DType
from fuser.quantized import Quantized

BLOCKS = (16, 32, 64, 128, 256)  # of MatMulNBits
SHORTEST = 16  # block of MatMulBnb4


@dataclass(eq=False)
class ByRows(Constant):
    """Rows computed from the same rows of other constants."""

    parts: tuple[Constant, ...]
    dtype: DType
    shape: tuple[int, ...]
    of: Callable[..., np.ndarray]

    def rows(self, start: int, stop: int) -> np.ndarray:
        found = self.of(*(part.rows(start, stop) for part in self.parts))
        return found.astype(self.dtype.numpy, copy=False).reshape(stop - start, *self.shape[1:])

    @property
    def is_known(self) -> bool:
        return all(part.is_known for part in self.parts)


@dataclass(eq=False)
class Stacked(Constant):
    """Constants above one another, along their first axis."""

    parts: tuple[Constant, ...]

    def __post_init__(self) -> None:
        first = self.parts[0]
        self.dtype, self.shape = first.dtype, (sum(part.shape[0] for part in self.parts), *first.shape[1:])

    def rows(self, start: int, stop: int) -> np.ndarray:
        found, top = [], 0
        for part in self.parts:
            below = top + part.shape[0]
            if start < below and stop > top:
                found.append(part.rows(max(start, top) - top, min(stop, below) - top))
            top = below
        return np.concatenate(found) if found else self.parts[0].rows(0, 0)

    @property
    def inner(self) -> tuple[Constant, ...]:
        return self.parts


def pieces(weight: Constant) -> list[Constant | Quantized]:
    """A weight [K, N] as parts along N: neighbours of one format are one Quantized [N', K], what is not quantized stays."""
    found: list[Constant | Quantized] = []
    for part in _parts(weight):
        last = found[-1] if found else None
        if isinstance(part, Quantized) and isinstance(last, Quantized) and _alike(part, last):
            found[-1] = _stacked(last, part)
        else:
            found.append(part)
    return found


def _parts(weight: Constant) -> list[Constant | Quantized]:
    if isinstance(weight, Joined):
        return [found for part in weight.parts for found in _parts(part)]
    if isinstance(weight, Transposed) and isinstance(weight.base, Quantized):
        return [weight.base]
    return [weight]


def stacked(constant: Constant) -> tuple[Constant, ...]:
    """The parts that stand above one another in a constant."""
    return constant.parts if isinstance(constant, Stacked) else (constant,)


def _alike(a: Quantized, b: Quantized) -> bool:
    return (a.format, a.width, a.dtype, a.scales.dtype) == (b.format, b.width, b.dtype, b.scales.dtype)


def _stacked(a: Quantized, b: Quantized) -> Quantized:
    def both(x: Constant, y: Constant) -> Constant:
        return Stacked((*stacked(x), y))

    zeros = None if a.zeros is None or b.zeros is None else both(a.zeros, b.zeros)
    return Quantized(both(a.codes, b.codes), both(a.scales, b.scales), zeros, a.format, a.width, a.dtype)


def holds_codes(constant: Constant | None) -> bool:
    """Whether a constant is made of quantized weights, or partly."""
    return constant is not None and any(isinstance(leaf, Quantized) for leaf in constant.leaves())


def nbits_block(weight: Quantized) -> int | None:
    """The block in which MatMulNBits holds a weight; a group of a whole row may be several with one scale."""
    format = weight.format
    if format.kind not in ("int4", "int8") or format.activations:
        return None
    if format.group is None:
        return next((block for block in BLOCKS if block >= weight.width), BLOCKS[-1])
    return format.group if format.group in BLOCKS else None


def nbits(weight: Quantized, block: int, dtype: DType) -> tuple[Constant, Constant, Constant | None]:
    """A weight as MatMulNBits holds it: codes uint8 [N, blocks, block * bits / 8], scales [N, blocks], zero points.

    Zero points are uint8 [N, blocks * bits / 8], packed as codes are.
    """
    N, bits = weight.shape[0], weight.format.bits
    blocks, bytes_ = -(-weight.width // block), block * bits // 8

    def padded(codes: np.ndarray) -> np.ndarray:
        return np.pad(codes, ((0, 0), (0, blocks * bytes_ - codes.shape[1])))

    def packed(zeros: np.ndarray) -> np.ndarray:
        spread = _spread(zeros, blocks)
        return spread if bits == 8 else nibbles(spread)

    codes = ByRows((weight.codes,), DType.UINT8, (N, blocks, bytes_), padded)
    scales = ByRows((weight.scales,), dtype, (N, blocks), lambda rows: _spread(rows, blocks))
    if weight.zeros is None:
        return codes, scales, None
    return codes, scales, ByRows((weight.zeros,), DType.UINT8, (N, -(-blocks * bits // 8)), packed)


def _spread(rows: np.ndarray, blocks: int) -> np.ndarray:
    """What groups have as blocks have it: of a whole row, each of its blocks."""
    return rows if rows.shape[1] == blocks else np.repeat(rows, blocks, axis=1)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes [N, K] of four bits as bytes [N, ceil(K / 2)], the first low."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    packed: np.ndarray = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed


def unpacked(packed: np.ndarray, bits: int, K: int) -> np.ndarray:
    """Bytes [N, ceil(K * bits / 8)] as codes [N, K], a byte each."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :K]


def codes_of(weight: Quantized) -> Constant:
    """[N, K] uint8, a byte each."""
    K, bits = weight.width, weight.format.bits
    return ByRows((weight.codes,), DType.UINT8, (weight.shape[0], K), lambda rows: unpacked(rows, bits, K))


def linear(weight: Quantized) -> tuple[Constant, Constant, Constant | None, int]:
    """A weight as DequantizeLinear holds it, [K, N]: codes, scales float32 and zero points, [groups, N]; the block along K.

    Symmetric integers are signed and have no zero points. With one scale a row they are [N], and the block is 0.
    """
    format, (N, K) = weight.format, weight.shape
    signed = {"int4": DType.INT4, "int8": DType.INT8, "fp8": DType.FLOAT8_E4M3FN}[format.kind]
    dtype = {DType.INT4: DType.UINT4, DType.INT8: DType.UINT8}[signed] if weight.zeros is not None else signed

    def shown(rows: np.ndarray) -> np.ndarray:
        values = unpacked(rows, format.bits, K)
        if dtype is DType.FLOAT8_E4M3FN:
            return values.view(ml_dtypes.float8_e4m3fn)
        return values if weight.zeros is not None else values.astype(np.int16) - format.middle

    codes = Transposed(ByRows((weight.codes,), dtype, (N, K), shown))
    groups = format.groups(K)

    def each(held: Constant, kept: DType) -> Constant:
        shape = (N,) if groups == 1 else (N, groups)
        found = ByRows((held,), kept, shape, lambda rows: rows)
        return found if groups == 1 else Transposed(found)

    zeros = None if weight.zeros is None else each(weight.zeros, dtype)
    return codes, each(weight.scales, DType.FLOAT32), zeros, 0 if groups == 1 else format.grouped(K)


def bnb(weight: Quantized) -> tuple[Constant, Constant, int, int]:
    """A weight as MatMulBnb4 holds it, row after row: codes uint8, of two in a byte the first high; scales float32; the
    block; K, with zeros up to a whole number of blocks in a row."""
    N, width = weight.shape
    group = weight.format.grouped(width)
    block = group if group in BLOCKS else SHORTEST
    if weight.format.groups(width) == 1:
        block = next((b for b in reversed(BLOCKS) if b <= width), SHORTEST)
    K = -(-width // block) * block
    zero = 7  # the code of 0.0

    def high_first(rows: np.ndarray) -> np.ndarray:
        codes = np.pad(unpacked(rows, 4, width), ((0, 0), (0, K - width)), constant_values=zero)
        packed: np.ndarray = codes[:, 0::2] << 4 | codes[:, 1::2]
        return packed

    codes = Flat(ByRows((weight.codes,), DType.UINT8, (N, K // 2), high_first))
    scales = ByRows((weight.scales,), DType.FLOAT32, (N, K // block), lambda rows: _spread(rows, K // block))
    return codes, Flat(scales), block, K


@dataclass(eq=False)
class Flat(Constant):
    """The elements of a matrix in one row after another."""

    base: Constant

    def __post_init__(self) -> None:
        self.dtype, self.shape = self.base.dtype, (self.base.size,)

    def rows(self, start: int, stop: int) -> np.ndarray:
        width = max(1, self.base.shape[1])
        top = start // width
        return self.base.rows(top, -(-stop // width)).reshape(-1)[start - top * width : stop - top * width]

    @property
    def inner(self) -> tuple[Constant, ...]:
        return (self.base,)


@dataclass(eq=False)
class Folded(Constant):
    """The elements of a row as a matrix."""

    base: Constant
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.dtype = self.base.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        width = self.shape[1]
        whole = self.base.numpy().reshape(-1) if len(self.base.shape) > 1 else None
        flat = self.base.rows(start * width, stop * width) if whole is None else whole[start * width : stop * width]
        return flat.reshape(stop - start, width)

    @property
    def inner(self) -> tuple[Constant, ...]:
        return (self.base,)
