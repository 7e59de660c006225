"""Rotary tables by what they hold: scale * cos(position * frequency), however theta was scaled. arXiv:2104.09864.

Linear, NTK, Llama 3 and YaRN (arXiv:2309.00071) scaling differ in the frequencies alone, and in YaRN's scale.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fuser.dims import Shape, concrete
from fuser.dtypes import DType
from fuser.fused import fused_op
from fuser.graph import FUSER, Value
from fuser.recognition import Disagrees, Recognition, Subject

POSITIONS = (0, 1, 2, 7, 64, 1000, 4097, 32771)
EXACT = 1e-9  # of the scale, in float64


@fused_op("positions[*P], frequencies[R] -> cos[*P, R], sin[*P, R]")
def rotary_table(positions: Tensor, frequencies: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(scale cos(p f), scale sin(p f)) for every position p of positions [*P] and f of frequencies [R], in f's type."""
    angles = positions.to(frequencies.dtype).unsqueeze(-1) * frequencies
    return angles.cos() * scale, angles.sin() * scale


@rotary_table.types
def _(inputs: Sequence[Value | None], attributes: dict[str, Any]) -> list[DType | None]:
    dtype = None if inputs[1] is None else inputs[1].dtype
    return [dtype, dtype]


@dataclass
class _Table:
    """A positional value with a row for every position."""

    subject: Subject
    start: Value  # the positions
    part: Subject  # from the positions to the value
    layout: str  # "once"; "halves": the columns, then the same again; "pairs": every column twice
    is_stored: bool  # rows are looked up, not computed

    def once(self, positions: Tensor) -> Tensor:
        """[N, R]: each column once, for positions [N]."""
        rows = _rows(self.part, self.start, positions)
        half = rows.shape[-1] // 2
        return rows[:, :half] if self.layout == "halves" else rows[:, ::2] if self.layout == "pairs" else rows


@rotary_table.recognizes
def _(recognition: Recognition) -> None:
    tables = [table for subject in recognition.subjects if (table := _table(subject)) is not None]
    computed = [table for table in tables if not table.is_stored]
    paired: set[int] = set()
    reasons: dict[int, str] = {}
    for sine, cosine in product(computed, computed):
        if sine.start is cosine.start and sine.layout == cosine.layout and not {id(sine), id(cosine)} & paired:
            try:
                closed = _closed_form(cosine, sine)
            except Disagrees as reason:
                reasons[id(cosine)] = str(reason)
                continue
            if closed is not None:
                _replace(recognition, cosine, sine, *closed)
                paired |= {id(sine), id(cosine)}
    for table in tables:
        if id(table) not in paired:
            if id(table) in reasons:
                expected = (
                    "cos[p, r], sin[p, r] = scale * cos(p f[r]), scale * sin(p f[r]), f the same for all positions"
                )
                recognition.refuse(rotary_table, table.part, expected, reasons[id(table)])
            _lay_out(recognition, table)


def _table(subject: Subject) -> _Table | None:
    """A subject that has a row of numbers for every position, else None."""
    value = subject.value
    if value.dtype is None or not value.dtype.is_float or not value.shape or not isinstance(value.shape[-1], int):
        return None
    if not any(node.op in ("Cos", "Sin", "Gather", "GatherElements", "GatherND") for node in subject.nodes):
        return None
    for start in _positions(subject):
        part = subject.after(start)
        if part is None:
            continue
        stored = [
            v.constant for node in part.nodes for v in node.inputs
            if v is not None and v.constant is not None and v.constant.dtype.is_float
            and sum(size > 1 for size in v.constant.shape) > 1
        ]  # fmt: skip
        limit = min((max(constant.shape[:-1]) for constant in stored), default=None)
        try:
            # Of a stored table all rows, of another those of positions far and near.
            rows = _rows(part, start, torch.tensor(POSITIONS) if limit is None else torch.arange(limit))
        except Disagrees:
            continue
        layout, half = "once", rows.shape[-1] // 2
        if rows.shape[-1] % 2 == 0 and half > 1 and torch.equal(rows[:, :half], rows[:, half:]):
            layout = "halves"
        elif rows.shape[-1] % 2 == 0 and half > 1 and torch.equal(rows[:, ::2], rows[:, 1::2]):
            layout = "pairs"
        return _Table(subject, start, part, layout, bool(stored))
    return None


def _positions(subject: Subject) -> Iterator[Value]:
    """Whole-number vectors [S] or [B, S] of the subgraph, from its end to its beginning."""
    made = [value for node in reversed(subject.nodes) for value in node.outputs]
    for value in (*made, *subject.inputs):
        if value.dtype is not None and value.dtype.is_integer and value.rank in (1, 2):
            yield value


def _rows(part: Subject, start: Value, positions: Tensor) -> Tensor:
    """The rows [N, W] that a value has for positions [N].

    Raises:
        Disagrees: there is not one row for each.
    """
    shape = start.shape or ()
    length = shape[-1] if isinstance(shape[-1], int) else len(positions)
    batch = -(-len(positions) // length)
    wanted = [(shape[-1], length)] + [(dim, dim if isinstance(dim, int) else batch) for dim in shape[:-1]]
    batch = wanted[-1][1] if len(shape) == 2 else 1
    sizes = part.sizes(wanted, 3)
    if sizes is None:
        raise Disagrees("the positions' dims are related")
    found = []
    for chunk in torch.split(positions, length * batch):
        padded = torch.cat([chunk, chunk[:1].expand(length * batch - len(chunk))])
        dtype = getattr(torch, str(start.dtype))
        held = part.evaluate(sizes, {start: padded.reshape(concrete(shape, sizes)).to(dtype)})
        if held.numel() != len(padded) * held.shape[-1] or [n for n in held.shape[:-1] if n > 1] != [
            n for n in concrete(shape, sizes) if n > 1
        ]:
            raise Disagrees("there is no row for each position")
        found.append(held.reshape(len(padded), -1)[: len(chunk)])
    return torch.cat(found)


def _closed_form(cosine: _Table, sine: _Table) -> tuple[Tensor, float] | None:
    """(frequencies [R], scale) where two tables hold cosines and sines of the same angles; None where they are no such pair.

    Raises:
        Disagrees: they do at the first positions, and not at others.
    """
    try:
        (cos_0, cos_1), (sin_0, sin_1) = (table.once(torch.tensor([0, 1])) for table in (cosine, sine))
        scale = float(cos_0[0])
        if cos_0.shape != sin_0.shape or scale <= 0 or sin_0.any() or not (cos_0 == scale).all():
            return None
        if not (torch.hypot(cos_1, sin_1) / scale - 1 < EXACT).all():
            return None
        frequencies = torch.atan2(sin_1, cos_1).float()
        positions = torch.tensor(POSITIONS)
        held = [table.once(positions) for table in (cosine, sine)]
    except Disagrees:
        return None
    wanted = rotary_table.reference(positions, frequencies.double(), scale=scale)
    for name, found, expected in zip(("cos", "sin"), held, wanted, strict=True):
        wrong = ((found - expected).abs() > EXACT * scale).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            together = f"positions of one sequence {', '.join(map(str, POSITIONS))}"
            place, alone = f"{name}[{POSITIONS[row]}, {column}]", f"the frequency {frequencies[column]:.6f} of 0 and 1"
            raise Disagrees(
                f"{together}: {place} is {found[row, column]:.6f}, and {expected[row, column]:.6f} with {alone}"
            )
    return frequencies, scale


def _replace(recognition: Recognition, cosine: _Table, sine: _Table, frequencies: Tensor, scale: float) -> None:
    """One node makes both tables, each column once; what they were laid out as is written around it."""
    found = recognition.constant(frequencies.numpy(), DType.FLOAT32)
    cos = recognition.emit(
        rotary_table.name, cosine.subject, [cosine.start, found], {"scale": scale}, domain=FUSER, outputs=2
    )
    assert cos.producer is not None
    for table, made in zip((cosine, sine), cos.producer.outputs, strict=True):
        value = table.subject.value
        if value.dtype is not made.dtype and value.dtype is not None:
            made = recognition.emit("Cast", table.subject, [made], {"to": value.dtype.onnx})
        recognition.graph.replace(value, _laid_out(recognition, table, made))


def _laid_out(recognition: Recognition, table: _Table, once: Value) -> Value:
    """Rows [*P, R] arranged as a table is, with every column as often as there, in the form that patterns know."""
    subject, shape = table.subject, table.subject.value.shape or ()
    axes = _inserted(once.shape or (), shape)
    if axes:
        once = recognition.emit("Unsqueeze", subject, [once], {"axes": axes})
    if table.layout == "once":
        return once
    if table.layout == "halves":
        return recognition.emit("Concat", subject, [once, once], {"axis": -1})
    column = recognition.emit("Unsqueeze", subject, [once], {"axes": (-1,)})
    pairs = recognition.emit("Concat", subject, [column, column], {"axis": -1})
    return recognition.emit("Reshape", subject, [pairs], {"shape": shape})


def _inserted(inner: Shape, outer: Shape) -> tuple[int, ...]:
    """The axes of size 1 by which `outer` is longer than `inner`, their last axes apart."""
    axes, rest = [], list(inner[:-1])
    for axis, dim in enumerate(outer[:-1]):
        if rest and dim == rest[0]:
            rest.pop(0)
        else:
            axes.append(axis)
    return tuple(axes)


def _lay_out(recognition: Recognition, table: _Table) -> None:
    """A table that is stored, or holds something else than sines, keeps its numbers and is laid out as patterns write it."""
    subject, value = table.subject, table.subject.value
    maker = value.producer
    if table.layout == "once" or maker is None or (maker.is_a("Concat") and len(set(map(id, maker.inputs))) == 1):
        return
    assert value.shape is not None and isinstance(value.shape[-1], int) and table.start.shape is not None
    width = value.shape[-1]
    readers = list(value.uses)
    ends, step = (width // 2, 1) if table.layout == "halves" else (width, 2)
    bounds = {"axes": (-1,), "starts": (0,), "ends": (ends,), "steps": (step,)}
    once = recognition.emit("Slice", subject, [value], bounds)
    rows = (*table.start.shape, width // 2)
    if once.shape != rows:
        once = recognition.emit("Reshape", subject, [once], {"shape": rows})
    arranged = _laid_out(recognition, table, once)
    for node, index in readers:
        recognition.graph.set_input(node, index, arranged)


@rotary_table.lower("functions")
def _(op: Any, positions: Any, frequencies: Any, *, scale: Any) -> Any:
    angles = op.Mul(op.Unsqueeze(op.CastLike(positions, frequencies), axes=(-1,)), frequencies)
    cos, sin = op.Cos(angles), op.Sin(angles)
    return (cos, sin) if scale == 1.0 else tuple(op.Mul(x, op.number(scale, frequencies)) for x in (cos, sin))


rotary_table.examples(
    {"P": ("B", "S"), "B": 2, "S": 3, "R": 8, "scale": 1.0, "kinds": {"positions": "positions"}},
    {"P": ("S",), "S": 3, "R": 5, "scale": 1.25, "kinds": {"positions": "positions"}},
)
