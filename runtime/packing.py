"""Codes of weights in the order in which kernels read them, packed once; that order is told in codegen/quantized.py."""

import torch
from torch import Tensor

from fuser.formats import Format
from fuser.quantized import Codes

UNIT = 16  # rows
REMAINS = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}  # what a kernel has multiplied code - zero by


def words(codes: Tensor, format: Format) -> Tensor:
    """Codes [N, K], a byte each, as int32 [units, steps, 2, 8, 16]; what N and K lack are codes of zero."""
    C = 512 // format.bits
    N, K = codes.shape
    missing = (0, -K % C, 0, -N % UNIT)
    if any(missing):
        codes = torch.nn.functional.pad(codes, missing, value=7 if format.kind == "nf4" else format.middle)
    J, P = 4, 16 // format.bits  # words of a thread's row, codes of a half
    shape = (codes.shape[0] // UNIT, 2, 8, codes.shape[1] // C, J, P, 4, 2)
    held = codes.to(torch.int32).view(shape).permute(0, 3, 1, 2, 6, 4, 7, 5)  # unit step r g t j half place
    within, apart = (format.bits, 16) if format.kind != "nf4" else (2 * format.bits, format.bits)
    shifts = torch.arange(P, device=codes.device) * within + torch.tensor([[0], [apart]], device=codes.device)
    made = (held << shifts.to(torch.int32)).sum((-1, -2), dtype=torch.int32)
    return made.flatten(-2).contiguous()


def packed(codes: Codes, sides: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a kernel takes for a weight: words, scales [groups, rows of all units], zeros likewise (None: in the middle).

    Args:
        codes: of the weight [N, K].
        sides: rows of it, [sides, columns], in the order of the kernel's columns.
        dtype: that the kernel computes in.
    """
    format = codes.format
    made = words(in_units(codes.codes, sides, 7 if format.kind == "nf4" else format.middle), format)
    scales = _steps(in_units(codes.scales, sides).T, format, codes.width)
    if codes.zeros is None:
        return made, scales, None
    zeros = (in_units(codes.zeros, sides).T.float() * -REMAINS[dtype]).to(dtype)
    return made, scales, _steps(zeros, format, codes.width)


def in_units(rows: Tensor, sides: Tensor, missing: int = 0) -> Tensor:
    """Rows in units of 16: of two sides, eight of the first and then those of the second that belong to them."""
    each = UNIT // len(sides)
    lacks = -sides.shape[1] % each
    found = [torch.nn.functional.pad(rows[of], (0, 0, 0, lacks), value=missing) for of in sides]
    return torch.stack([side.reshape(-1, each, side.shape[1]) for side in found], 1).flatten(0, 2)


def _steps(rows: Tensor, format: Format, K: int) -> Tensor:
    """Rows [groups, N] for every group that steps of codes reach."""
    C = 512 // format.bits
    group = format.grouped(K)
    wanted = -(-K // C) * C // group if group < C else len(rows)
    missing = max(wanted - len(rows), 0)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).contiguous()
