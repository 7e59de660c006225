"""Position ids by what they hold: counted from the length of the past, or from which tokens are padding.

positions[b, i] = start + i, or, with padding, n[b, P + i] - 1 + offset, where n counts the tokens up to one, itself included.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fuser import dims
from fuser.content import content
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.fused import fused_op
from fuser.graph import FUSER, Value
from fuser.pattern import require
from fuser.patterns.rotary_table import rotary_table
from fuser.recognition import Disagrees, Recognition, Subject, Symbols, subject_of

SIZES = ((1, 3, 2), (2, 5, 3), (3, 7, 0), (1, 1, 0), (2, 1, 6), (2, 3, 1001))  # (B, S, P)


@fused_op("shape[R], start[], padding[B, T]? -> positions[*M]")
def position_ids(
    shape: Tensor, start: Tensor, padding: Tensor | None = None, *, offset: int = 0, padded: int = 0
) -> Tensor:
    """int64 positions of the last S of T tokens. `shape` holds the result's: [B or 1, S] or [S].

    Without padding start + i. padding [B, T], of any type, 0 where a token is none: as many as there are tokens before, plus
    `offset`; at those that are none `padded`.
    """
    *_, S = wanted = shape.tolist()
    if padding is None:
        return (torch.arange(S) + start).expand(wanted)
    tokens = (padding != 0).long()
    counted = torch.where(tokens == 1, tokens.cumsum(-1) - 1 + offset, padded)
    return counted[:, tokens.shape[1] - S :]


@position_ids.shapes
def _(bound: dict[str, Any], inputs: Sequence[Value | None], **attributes: int) -> list[Shape]:
    shape = content(inputs[0])
    require(isinstance(shape, tuple), "position_ids: the shape must be known", inputs[0])
    return [shape]


@position_ids.types
def _(inputs: Sequence[Value | None], attributes: dict[str, Any]) -> list[DType]:
    return [DType.INT64]


@position_ids.recognizes
def _(recognition: Recognition) -> None:
    tables = [node.inputs[0] for node in recognition.graph.nodes if node.is_a(rotary_table.name, FUSER)]
    indices = [
        node.inputs[1]
        for node in recognition.graph.nodes
        if node.is_a("Gather") and node.inputs[0] is not None and node.inputs[0].constant is not None
    ]
    for value in dict.fromkeys(v for v in (*tables, *indices) if v is not None):
        subject = subject_of(recognition.graph, value)
        shape = value.shape or ()
        if subject is None or value.dtype is None or not value.dtype.is_integer or len(shape) not in (1, 2):
            continue
        if any(given.rank != 2 for given in subject.inputs) or subject.makes(shape[-1]):
            continue
        try:
            found = _counted(subject) if subject.inputs else _consecutive(subject)
        except Disagrees as reason:
            recognition.refuse(position_ids, subject, "positions that follow one another", str(reason))
            continue
        if found is None:
            continue
        start, attributes = found
        given = [recognition.emit("Dims", subject, [], {"dims": dim}, domain=FUSER) for dim in (shape, start)]
        new = recognition.emit(position_ids.name, subject, [*given, *subject.inputs], attributes, domain=FUSER)
        if value.dtype is not DType.INT64:
            new = recognition.emit("Cast", subject, [new], {"to": value.dtype.onnx})
        recognition.graph.replace(value, new)


def _instances(subject: Subject) -> list[tuple[str, Symbols, int, int, int]]:
    """(what it is, sizes, B, S, P) as far as the subject's fixed dims allow; none where those are too few to tell."""
    found = list(_possible(subject))
    lengths = {new for *_, new, _ in found if new > 1}
    is_fixed = isinstance((subject.value.shape or (0,))[-1], int)
    return found if is_fixed or len(lengths) > 1 else []


def _possible(subject: Subject) -> Iterator[tuple[str, Symbols, int, int, int]]:
    shape = subject.value.shape or ()
    stored = [max(constant.shape) for constant in subject.constants if constant.size > 1]  # all of it is looked at
    whole = [(1, size, 0) for size in stored] + [(2, 3, size - 3) for size in stored]
    for B, S, P in (*SIZES, *whole):
        if P < 0 or min(stored, default=S + P) < S + P:
            continue
        new = shape[-1] if isinstance(shape[-1], int) else S
        wanted: list[tuple[Dim, int]] = [(shape[-1], new)]
        if len(shape) == 2:
            wanted.append((shape[0], shape[0] if isinstance(shape[0], int) else B))
        for given in subject.inputs:
            wanted += zip(given.shape or (), (B, new + P), strict=True)
        sizes = subject.sizes(wanted, otherwise=P)
        if sizes is not None:
            yield f"batch {B}, {new} new tokens on {P}", sizes, B, new, P


def _consecutive(subject: Subject) -> tuple[Dim, dict[str, int]] | None:
    """Where positions start that depend on sizes alone; None where they are none.

    Raises:
        Disagrees: they follow one another on one instance and do not on another.
    """
    starts: list[Dim] | None = None
    for name, sizes, *_ in _instances(subject):
        held = subject.evaluate(sizes, {})
        rows = held.reshape(-1, held.shape[-1])
        follows = rows.numel() > 0 and bool((rows == rows[0, 0] + torch.arange(rows.shape[1])).all())
        if starts is None and not follows:
            return None  # token ids, or types
        if not follows:
            raise Disagrees(f"{name}: they are {rows[0, :8].tolist()}")
        starts = _starts(sizes, subject) if starts is None else starts
        starts = [start for start in starts if dims.substitute(start, dict(sizes)) == int(rows[0, 0])]
        if not starts:
            raise Disagrees(f"{name}: they start at {int(rows[0, 0])}")
    return (starts[0], {"offset": 0, "padded": 0}) if starts else None


def _starts(sizes: Symbols, subject: Subject) -> list[Dim]:
    """The sizes that positions may start at: none, a symbol's, or what one is longer than the tokens; or a number."""
    new = (subject.value.shape or (0,))[-1]
    known = sorted(sizes, key=str)
    return [0, *known, *(dims.sub(symbol, new) for symbol in known), *subject.numbers, 1]


def _counted(subject: Subject) -> tuple[Dim, dict[str, int]] | None:
    """How positions count the tokens of a padding mask; None where they do not.

    Raises:
        Disagrees: they do on one instance and do not on another.
    """
    if len(subject.inputs) != 1 or len(subject.value.shape or ()) != 2:
        return None
    (padding,) = subject.inputs
    if any(user.is_a("Gather") and user.input(1) is padding for user in padding.consumers):
        return None  # token ids are more than a token or none
    found: dict[str, int] | None = None
    for name, sizes, B, S, P in _instances(subject):
        tokens = torch.ones(B, S + P, dtype=torch.int64)
        if S + P > 2:
            tokens[0, : (S + P) // 2 + 1], tokens[-1, -1] = 0, 0
        dtype = torch.float64 if padding.dtype is None or padding.dtype.is_float else getattr(torch, str(padding.dtype))
        held = subject.evaluate(sizes, {padding: tokens.to(dtype)})
        empty = (tokens == 0)[:, P:]
        if found is None:
            count = tokens.cumsum(-1)[:, P:] - 1
            if held.shape != count.shape or not empty.any() or empty.all():
                return None
            found = {"offset": int((held - count)[~empty][0]), "padded": int(held[empty][0])}
        wanted = position_ids.reference(torch.tensor((B, S)), torch.tensor(0), tokens, **found)
        if not torch.equal(held, wanted):
            if name.startswith("batch 1, 3"):
                return None
            raise Disagrees(f"{name}: they are {held[0, :8].tolist()} where {wanted[0, :8].tolist()} was expected")
    return None if found is None else (0, found)


@position_ids.lower("functions")
def _(op: Any, shape: Any, start: Any, padding: Any, *, offset: int, padded: int) -> Any:
    wanted = content(shape)
    one = op.constant(1, DType.INT64)
    if padding is None:
        rows = op.Range(op.constant(0, DType.INT64), op.size(shape, -1), one)
        rows = rows if content(start) == 0 else op.Add(rows, start)
        if wanted is not None and len(wanted) == 1:
            return rows
        return op.Unsqueeze(rows, axes=(0,)) if wanted is not None and wanted[0] == 1 else op.Expand(rows, shape)
    tokens = op.Cast(op.Cast(padding, to=DType.BOOL.onnx), to=DType.INT64.onnx)
    counted = op.CumSum(tokens, op.constant(1, DType.INT64))
    counted = op.Add(counted, op.constant(offset - 1, DType.INT64)) if offset != 1 else counted
    counted = op.Where(op.Cast(padding, to=DType.BOOL.onnx), counted, op.constant(padded, DType.INT64))
    last = op.Neg(op.size(shape, -1))
    ends = op.constant((1 << 31,), DType.INT64)
    return op.Slice(counted, op.Unsqueeze(last, axes=(0,)), ends, op.constant((-1,), DType.INT64))


_SIZES = {"B": 2, "S": 3, "T": 7, "R": 2, "kinds": {"shape": "sizes", "padding": "padding", "start": "positions"}}
position_ids.examples(
    {**_SIZES, "M": ("B", "S"), "offset": 2, "padded": 1},
    {**_SIZES, "M": ("B", "S"), "offset": 0, "padded": -1},
    {**_SIZES, "M": (1, "S"), "offset": 0, "padded": 0, "without": ("padding",)},
    {**_SIZES, "M": ("S",), "R": 1, "offset": 0, "padded": 0, "without": ("padding",)},
)
