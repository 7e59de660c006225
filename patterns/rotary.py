"""Rotary position embedding: pairs of channels turned by an angle that grows with the position. arXiv:2104.09864.

For pairs (x1, x2): y = (x1 cos - x2 sin, x2 cos + x1 sin). The tables hold one angle a pair.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.fused import fused_op
from fuser.pattern import Match, applies, capture, keep, op, require
from fuser.patterns.heads import arranged, as_tokens


@fused_op("x[B, H, S, Dh], cos[*C], sin[*C] -> y[B, H, S, Dh]")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, interleaved: bool = False) -> Tensor:
    """The first `rotary_dim` = 2R channels of x [B, H, S, Dh] turned, the others kept.

    cos and sin broadcast to [B, H, S, R], or are [B, S, R]. Pairs are (i, i + R), or (2i, 2i + 1) when interleaved.
    """
    cos, sin = (table.unsqueeze(1) if table.dim() == 3 else table for table in (cos, sin))
    turning, rest = torch.split(x, [rotary_dim, x.shape[-1] - rotary_dim], dim=-1)
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], dim=-1)


def _halves(x: Any, cos: Any, sin: Any) -> Any:
    """Pairs (i, i + R)."""
    first, second = op.Split(x, axis=-1, outputs=2)
    table_cos = keep(op.Concat(cos, cos, axis=-1))
    table_sin = keep(op.Concat(sin, sin, axis=-1))
    return x * table_cos + op.Concat(-second, first, axis=-1) * table_sin


def _every_other(x: Any) -> tuple[Any, Any]:
    return tuple(op.Slice(x, axes=(-1,), starts=(start,), steps=(2,)) for start in (0, 1))


def _alternating(first: Any, second: Any) -> Any:
    """One from here, one from there."""
    return op.Reshape(op.Concat(op.Unsqueeze(first, axes=(-1,)), op.Unsqueeze(second, axes=(-1,)), axis=-1))


def _pairs(x: Any, cos: Any, sin: Any) -> Any:
    """Pairs (2i, 2i + 1)."""
    first, second = _every_other(x)

    def table(once: Any) -> Any:
        column = keep(op.Unsqueeze(once, axes=(-1,)))
        return keep(op.Reshape(keep(op.Concat(column, column, axis=-1))))

    return x * table(cos) + _alternating(-second, first) * table(sin)


def _turned(first: Any, second: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    return first * cos - second * sin, second * cos + first * sin


def _pairs_apart(x: Any, cos: Any, sin: Any) -> Any:
    return _alternating(*_turned(*_every_other(x), cos, sin))


def _declare(turn: Callable[[Any, Any, Any], Any], interleaved: bool) -> None:
    """A way to turn, of the first channels and of all. The former first: the latter would take the part that turns."""

    @rotary.source
    def partial(x: Any, cos: Any, sin: Any) -> Any:
        turning, rest = op.Split(x, axis=-1, outputs=2)
        return op.Concat(turn(turning, cos, sin), rest, axis=-1)

    @partial.attributes
    def _(m: Match) -> dict[str, Any]:
        turning = next(node for node in m.region if node.is_a("Split") and node.inputs[0] is m.x)
        return {"rotary_dim": turning.attributes["split"][0], "interleaved": interleaved}

    @rotary.source
    def whole(x: Any, cos: Any, sin: Any) -> Any:
        return turn(x, cos, sin)

    @whole.attributes
    def _(m: Match) -> dict[str, Any]:
        known = m.x.rank == 4 and isinstance(m.x.shape[-1], int)
        require(known, "rotary: x must be [B, heads, tokens, width] of known width", m.x)
        return {"rotary_dim": m.x.shape[-1], "interleaved": interleaved}


_declare(_halves, False)
_declare(_pairs, True)
_declare(_pairs_apart, True)


@rotary.source
def whole_by_halves(x: Any, cos: Any, sin: Any) -> Any:
    first, second = op.Split(x, axis=-1, outputs=2)
    return op.Concat(*_turned(first, second, cos, sin), axis=-1)


@rotary.source
def partial_by_halves(x: Any, cos: Any, sin: Any) -> Any:
    first, second, rest = op.Split(x, axis=-1, outputs=3)
    return op.Concat(*_turned(first, second, cos, sin), rest, axis=-1)


@whole_by_halves.attributes
@partial_by_halves.attributes
def _(m: Match) -> dict[str, Any]:
    (halves,) = (node for node in m.region if node.is_a("Split"))
    return {"rotary_dim": sum(halves.attributes["split"][:2]), "interleaved": False}


@rotary.source
def standard(x: Any, cos: Any, sin: Any) -> Any:
    return op.RotaryEmbedding(
        x, cos, sin, interleaved=capture("interleaved"), rotary_embedding_dim=capture("rotary_dim")
    )


@standard.attributes
def _(m: Match) -> dict[str, Any]:
    applies(m.x.rank == 4 and isinstance(m.x.shape[-1], int))
    return {"rotary_dim": m.attributes["rotary_dim"] or m.x.shape[-1], "interleaved": bool(m.attributes["interleaved"])}


@rotary.lower("ort", opset=23)
def _(op: Any, x: Any, cos: Any, sin: Any, *, rotary_dim: int, interleaved: bool) -> Any:
    tables = _tables(op, cos, sin, (x.shape[0], x.shape[2], rotary_dim // 2))
    # The operator has no float64; in float16 it rounds more than the nodes it replaces do.
    if op.opset < 23 or tables is None or not isinstance(x.shape[1], int) or x.dtype in (DType.FLOAT16, DType.FLOAT64):
        return rotary.lowerings["functions"](op, x, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved)
    # Some versions of ONNX Runtime want the number of heads where not every channel turns.
    part = {} if rotary_dim == x.shape[3] else {"rotary_embedding_dim": rotary_dim, "num_heads": x.shape[1]}
    return op.RotaryEmbedding(x, *tables, **part, interleaved=int(interleaved))


def _tables(op: Any, cos: Any, sin: Any, whole: Shape) -> list[Any] | None:
    """Tables as `whole`, [B, S, R], a row for each position of each sequence; None where heads have their own."""
    found = []
    for table in (cos, sin):
        rows = table.producer
        if rows is not None and rows.is_a("Unsqueeze") and rows.attributes.get("axes") == (1,) and table.rank == 4:
            table = rows.inputs[0]
        elif table.rank == 4 and table.shape[1] == 1:
            table = op.once("rows", lambda op, table=table: op.Squeeze(table, axes=(1,)), table)
        if (
            table.rank not in (2, 3)
            or table.shape[-2:] != whole[1:]
            or (table.rank == 3 and table.shape[0] not in (1, whole[0]))
        ):
            return None
        if table.shape != whole:
            table = op.once("every sequence", lambda op, table=table: op.Expand(table, shape=whole), table)
        found.append(table)
    return found


def embedded(op: Any, x: Any, cos: Any, sin: Any, heads: int, *, rotary_dim: int, interleaved: bool) -> Any:
    """Tokens [B, S, heads * Dh] turned, from tokens or from what is arranged by head, with an operator where that can be."""
    batch, length = x.shape[0], x.shape[1 if x.rank == 3 else 2]
    tables = _tables(op, cos, sin, (batch, length, rotary_dim // 2))
    if op.opset < 23 or tables is None or x.dtype is DType.FLOAT64:
        turned = rotary.lowerings["functions"](
            op, arranged(op, x, heads), cos, sin, rotary_dim=rotary_dim, interleaved=interleaved
        )
        return as_tokens(op, turned)
    x = as_tokens(op, x)
    part = {} if rotary_dim * heads == x.shape[2] else {"rotary_embedding_dim": rotary_dim}
    return op.RotaryEmbedding(x, *tables, **part, num_heads=heads, interleaved=int(interleaved))


rotary.lower("onnx", opset=23)(rotary.lowerings["ort"])


@rotary.lower("functions")
def _(op: Any, x: Any, cos: Any, sin: Any, *, rotary_dim: int, interleaved: bool) -> Any:
    cos, sin = (op.Unsqueeze(table, axes=(1,)) if len(table.shape) == 3 else table for table in (cos, sin))
    half, rest = rotary_dim // 2, x.shape[-1] - rotary_dim
    if not interleaved:
        sizes = (half, half, rest) if rest else (half, half)
        first, second, *kept = op.Split(x, axis=-1, split=sizes, outputs=len(sizes))
    else:
        first, second = (op.Slice(x, axes=(-1,), starts=(i,), ends=(rotary_dim,), steps=(2,)) for i in (0, 1))
        kept = [op.Slice(x, axes=(-1,), starts=(rotary_dim,), ends=(x.shape[-1],), steps=(1,))] if rest else []
    turned = [op.Sub(op.Mul(first, cos), op.Mul(second, sin)), op.Add(op.Mul(second, cos), op.Mul(first, sin))]
    if interleaved:
        both = op.Concat(*(op.Unsqueeze(part, axes=(-1,)) for part in turned), axis=-1)
        turned = [op.Reshape(both, op.constant((0, 0, 0, rotary_dim), DType.INT64))]
    return turned[0] if interleaved and not kept else op.Concat(*turned, *kept, axis=-1)


_SIZES = {"B": 2, "H": 4, "S": 3, "Dh": 16}
rotary.examples(
    {**_SIZES, "C": ("B", 1, "S", 8), "rotary_dim": 16, "interleaved": False},
    {**_SIZES, "C": ("B", "S", 8), "rotary_dim": 16, "interleaved": False},
    {**_SIZES, "C": (1, 1, "S", 8), "rotary_dim": 16, "interleaved": False},
    {**_SIZES, "C": ("S", 8), "rotary_dim": 16, "interleaved": False},
    {**_SIZES, "C": ("B", 1, "S", 6), "rotary_dim": 12, "interleaved": False},
    {**_SIZES, "C": ("B", "S", 6), "rotary_dim": 12, "interleaved": False},
    {**_SIZES, "C": ("B", 1, "S", 8), "rotary_dim": 16, "interleaved": True},
    {**_SIZES, "C": ("B", 1, "S", 6), "rotary_dim": 12, "interleaved": True},
    {**_SIZES, "C": ("B", "S", 6), "rotary_dim": 12, "interleaved": True},
    {**_SIZES, "C": ("S", 6), "rotary_dim": 12, "interleaved": True},
)
