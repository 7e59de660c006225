"""Quantized weights: codes from weights and back, in torch; a constant that holds codes; what modules call.

Codes are one byte each while they are computed with, [N, K] uint8, and packed as `Format.packed` says where they are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fuser.constants import Constant
from fuser.dtypes import DType
from fuser.errors import InputError
from fuser.formats import FP8_MOST, NF4, Format, format_of
from fuser.tensors import tensor_of, to_array, to_tensor

SMALLEST = 2.0**-17  # a scale below is kept as bfloat16: of float16 it would have fewer than 7 bits

BLOCK = 256  # scales of eight bits that share a scale


def scales_of(weight: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """The scales [N, groups], as they are kept, that let every weight of a group be a code, and zeros where there are any.

    Args:
        weight: [N, K], finite.

    Raises:
        InputError: a weight is not finite.
    """
    rows = _by_group(weight.float(), format)
    zeros = None
    if format.symmetric:
        scales = torch.maximum(rows.amax(-1), -rows.amin(-1)) / format.most
    else:
        low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
        scales = (high - low) / (2 * format.middle - 1)
    if not scales.isfinite().all():
        raise InputError("a weight that is to be quantized holds numbers that are not finite")
    kept = _kept(scales)
    if not format.symmetric:
        wide = kept.float()
        zeros = torch.where(wide > 0, -low / wide.clamp(min=torch.finfo(torch.float32).tiny), format.middle)
        zeros = zeros.round().clamp(0, 2 * format.middle - 1).to(torch.uint8)
    return kept, zeros


def _kept(scales: Tensor) -> Tensor:
    """Scales in the type they are kept in: float16 where it has enough of their bits."""
    fits = (scales == 0) | ((scales >= SMALLEST) & (scales <= torch.finfo(torch.float16).max))
    return scales.to(torch.float16 if fits.all() else torch.bfloat16)


def _by_group(weight: Tensor, format: Format) -> Tensor:
    """[N, K] as [N, groups, group]; what the last group lacks is zeros."""
    N, K = weight.shape
    group = format.grouped(K)
    missing = -K % group
    if missing:
        weight = torch.nn.functional.pad(weight, (0, missing))
    return weight.reshape(N, -1, group)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, format: Format) -> Tensor:
    """The codes [N, K] nearest to a weight [N, K] by given scales, ties to even; where a scale is 0, those of zero."""
    K = weight.shape[1]
    wide = scales.float().unsqueeze(-1)
    rows = _by_group(weight.float(), format) / torch.where(
        wide == 0, 1.0, wide
    )  # the one copy; it is worked on in place
    rows.masked_fill_(wide == 0, 0.0)
    if format.kind == "nf4":
        levels = torch.tensor(NF4, device=weight.device)
        codes = torch.bucketize(rows.contiguous(), (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    elif format.kind == "fp8":
        codes = rows.clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        zero = format.middle if zeros is None else zeros.float().unsqueeze(-1)
        least = 1 if format.symmetric else 0
        codes = rows.round_().add_(zero).clamp_(least, 2 * format.middle - 1).to(torch.uint8)
    return codes.flatten(1)[:, :K]


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, format: Format) -> Tensor:
    """The weight [N, K], float32, that codes [N, K] stand for."""
    if format.kind == "nf4":
        values = torch.tensor(NF4, device=codes.device)[codes.int()]
    elif format.kind == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        values = codes.float()
    rows = _by_group(values, format)
    if format.kind in ("int4", "int8"):
        rows.sub_(format.middle if zeros is None else zeros.float().unsqueeze(-1))
    return rows.mul_(scales.float().unsqueeze(-1)).flatten(1)[:, : codes.shape[1]]


class Doubled(NamedTuple):
    """Scales in eight bits each (QLoRA, arXiv:2305.14314): mean + (code - 128) * the scale of 256 neighbours, row after row.

    codes: uint8 [N, groups]; seconds: float32 [1 + blocks], the mean of all scales, and the scale of each block.
    """

    codes: Tensor
    seconds: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales that they stand for: float16 where it has enough of the mean's bits, and holds the largest."""
        mean, *seconds = self.seconds.tolist()
        fits = mean == 0 or (mean >= SMALLEST and mean + 127 * max(seconds) <= torch.finfo(torch.float16).max)
        return torch.float16 if fits else torch.bfloat16

    def scales(self, start: int = 0) -> Tensor:
        """[N, groups], of which none is negative; `start`: scales in rows before the first of these codes."""
        flat = self.codes.flatten().float() - 128
        block = (torch.arange(len(flat), device=flat.device) + start) // BLOCK
        wide = self.seconds[0] + flat * self.seconds[1:][block]
        return wide.clamp(min=0).view(self.codes.shape).to(self.dtype)


def doubled(scales: Tensor) -> Doubled:
    """Scales [N, groups] in eight bits each."""
    flat = scales.float().flatten()
    mean = flat.mean()
    blocks = torch.nn.functional.pad(flat - mean, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    seconds = blocks.abs().amax(1) / 127
    codes = (blocks / torch.where(seconds == 0, 1.0, seconds)[:, None]).round() + 128
    return Doubled(codes.flatten()[: len(flat)].view(scales.shape).to(torch.uint8), torch.cat([mean[None], seconds]))


@dataclass(eq=False)
class DoubledScales(Constant):
    """Scales [N, groups] held as `Doubled` holds them; to those who read elements they are the scales."""

    codes: Constant
    seconds: Constant

    def __post_init__(self) -> None:
        blocks = -(-self.codes.size // BLOCK)
        if self.seconds.shape != (1 + blocks,):
            raise InputError(f"scales of eight bits: seconds must be {[1 + blocks]}, got {[*self.seconds.shape]}")
        self.shape = self.codes.shape
        held = Doubled(torch.empty(0), tensor_of(self.seconds)).dtype if self.seconds.is_known else torch.float16
        self.dtype = DType(str(held).removeprefix("torch."))

    @property
    def stored_bytes(self) -> int:
        return self.codes.stored_bytes + self.seconds.stored_bytes

    @property
    def is_known(self) -> bool:
        return self.codes.is_known and self.seconds.is_known

    def rows(self, start: int, stop: int) -> np.ndarray:
        held = Doubled(to_tensor(self.codes.rows(start, stop)), tensor_of(self.seconds).cpu())
        return to_array(held.scales(start * self.shape[1]))


def pack(codes: Tensor, format: Format) -> Tensor:
    """Codes [N, K] as they are kept, [N, Format.packed(K)] uint8."""
    if format.bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor, format: Format, K: int) -> Tensor:
    """The codes [N, K]."""
    if format.bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :K]


@dataclass(eq=False)
class Quantized(Constant):
    """A weight [N, K] held as codes; to those who read elements it is the weight that the codes stand for.

    codes: uint8 [N, Format.packed(K)]; scales: float16, bfloat16 or float32 [N, groups]; zeros: uint8 likewise, or None.
    """

    codes: Constant
    scales: Constant
    zeros: Constant | None
    format: Format
    width: int  # K
    dtype: DType = DType.FLOAT32  # of the weight it stands for

    def __post_init__(self) -> None:
        N, groups = self.codes.shape[0], self.format.groups(self.width)
        self.shape = (N, self.width)
        wanted = {"codes": (N, self.format.packed(self.width)), "scales": (N, groups), "zeros": (N, groups)}
        for name, shape in wanted.items():
            held: Constant | None = getattr(self, name)
            if held is not None and held.shape != shape:
                raise InputError(f"a weight in {self.format}: {name} must be {[*shape]}, got {[*held.shape]}")

    @property
    def parts(self) -> list[Constant]:
        """What is stored."""
        return [part for part in (self.codes, self.scales, self.zeros) if part is not None]

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self.parts)

    @property
    def is_known(self) -> bool:
        return all(part.is_known for part in self.parts)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return to_array(self.tensors(start, stop).weight).astype(self.dtype.numpy)

    def tensors(self, start: int = 0, stop: int | None = None) -> "Codes":
        """Its rows from `start` to `stop`, in memory."""
        stop = self.shape[0] if stop is None else stop
        whole = (start, stop) == (0, self.shape[0])

        def part(constant: Constant) -> Tensor:
            held = tensor_of(constant)
            return held if whole else held[start:stop]

        zeros = part(self.zeros) if self.zeros is not None else None
        return Codes(part(self.codes), part(self.scales), zeros, self.format, self.width)


@dataclass(frozen=True)
class Codes:
    """The tensors of a quantized weight: codes packed, scales, zeros; what the scales are kept as, where that is eight bits."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: Format
    width: int
    doubled: Doubled | None = None

    @classmethod
    def of(cls, weight: Tensor, format: Format) -> "Codes":
        """A weight [N, K] rounded to the nearest codes.

        Raises:
            InputError: a weight is not finite.
        """
        return cls.by(weight, *scales_of(weight, format), format)

    @classmethod
    def by(cls, weight: Tensor, scales: Tensor, zeros: Tensor | None, format: Format) -> "Codes":
        """A weight [N, K] rounded to the nearest codes by given scales, as the format keeps these."""
        held = doubled(scales) if format.double else None
        scales = scales if held is None else held.scales()
        packed = pack(encode(weight, scales, zeros, format), format)
        return cls(packed, scales, zeros, format, weight.shape[1], held)

    def to(self, device: torch.device) -> "Codes":
        """On a device."""
        held = None if self.doubled is None else Doubled(*(part.to(device) for part in self.doubled))
        zeros = None if self.zeros is None else self.zeros.to(device)
        return Codes(self.packed.to(device), self.scales.to(device), zeros, self.format, self.width, held)

    @cached_property
    def codes(self) -> Tensor:
        """[N, K], a byte each."""
        return unpack(self.packed, self.format, self.width)

    @property
    def numbers(self) -> Tensor:
        """Symmetric codes of eight bits as the numbers they stand for, before scales: int8 or float8_e4m3fn [N, K]."""
        if self.format.kind == "fp8":
            return self.codes.view(torch.float8_e4m3fn)
        return (self.codes.to(torch.int16) - self.format.middle).to(torch.int8)

    @property
    def weight(self) -> Tensor:
        """What it stands for, [N, K] float32."""
        return decode(self.codes, self.scales, self.zeros, self.format)


_rounds = True


@contextmanager
def unrounded() -> Iterator[None]:
    """Within, activations are not rounded: two ways to compute one thing are compared without what rounding magnifies."""
    global _rounds
    before, _rounds = _rounds, False
    try:
        yield
    finally:
        _rounds = before


def round_activations(x: Tensor, kind: str) -> Tensor:
    """Each row of x [.., K] rounded to int8 or E4M3 numbers by a scale of its own, and back, in x's type."""
    if not _rounds:
        return x.clone()
    values, scales = quantize_activations(x, kind)
    return (values.float() * scales).to(x.dtype)


def quantize_activations(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows of x [.., K] as int8 or float8_e4m3fn [.., K] and their scales [.., 1] float32; a row of zeros has scale 1.

    A row that holds a number that is not finite has no scale: NaN, so that everything made of it is.
    """
    wide = x.float()
    most = 127.0 if kind == "int8" else FP8_MOST
    scales = wide.abs().amax(-1, keepdim=True) / most
    scales = torch.where(scales.isfinite(), torch.where(scales > 0, scales, 1.0), torch.nan)
    rows = wide / scales
    if kind == "int8":
        return rows.nan_to_num(0).round().clamp(-127, 127).to(torch.int8), scales
    return rows.clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn), scales


@torch.library.custom_op("fuser::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    seconds: Tensor | None,
    format: str,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, width] of codes, in `dtype`: what a quantized linear calls, and importers read as a `Quantized`."""
    scales = scales if seconds is None else Doubled(scales, seconds).scales()
    return Codes(codes, scales, zeros, format_of(format), width).weight.to(dtype)


@dequantize.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    seconds: Tensor | None,
    format: str,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], width), dtype=dtype)


@torch.library.custom_op("fuser::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, kind: str) -> Tensor:
    """`round_activations`, whole in a captured program."""
    return round_activations(x, kind)


@fake_quantize.register_fake
def _(x: Tensor, kind: str) -> Tensor:
    return torch.empty_like(x)
