"""Rotary position embedding: pairs of channels turned by an angle that grows with the position. arXiv:2104.09864.

For half-split pairs (x1, x2): y = (x1 cos - x2 sin, x2 cos + x1 sin). The tables hold one angle a pair.
"""

from typing import Any

import torch
from torch import Tensor

from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.fused import fused_op
from fuser.graph import Value
from fuser.pattern import Match, applies, capture, keep, op, require


@fused_op("x[B, H, S, Dh], cos[*C], sin[*C] -> y[B, H, S, Dh]")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int) -> Tensor:
    """The first `rotary_dim` = 2R channels of x [B, H, S, Dh] turned, the others kept.

    cos and sin broadcast to [B, H, S, R], or are [B, S, R].
    """
    cos, sin = (table.unsqueeze(1) if table.dim() == 3 else table for table in (cos, sin))
    first, second, rest = torch.split(x, [rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _turned(x: Any, cos: Any, sin: Any) -> Any:
    first, second = op.Split(x, axis=-1, outputs=2)
    table_cos = keep(op.Concat(cos, cos, axis=-1))
    table_sin = keep(op.Concat(sin, sin, axis=-1))
    return x * table_cos + op.Concat(-second, first, axis=-1) * table_sin


# Before the whole one, which would take the part that turns alone.
@rotary.source
def partial(x: Any, cos: Any, sin: Any) -> Any:
    turning, rest = op.Split(x, axis=-1, outputs=2)
    return op.Concat(_turned(turning, cos, sin), rest, axis=-1)


@partial.attributes
def _(m: Match) -> dict[str, Any]:
    turning = next(node for node in m.region if node.is_a("Split") and node.inputs[0] is m.x)
    return {"rotary_dim": turning.attributes["split"][0]}


@rotary.source
def whole(x: Any, cos: Any, sin: Any) -> Any:
    return _turned(x, cos, sin)


@whole.attributes
def _(m: Match) -> dict[str, Any]:
    require(m.x.shape is not None and isinstance(m.x.shape[-1], int), "rotary: the head dim must be known", m.x)
    return {"rotary_dim": m.x.shape[-1]}


def _turned_halves(first: Any, second: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    return first * cos - second * sin, second * cos + first * sin


@rotary.source
def whole_by_halves(x: Any, cos: Any, sin: Any) -> Any:
    first, second = op.Split(x, axis=-1, outputs=2)
    return op.Concat(*_turned_halves(first, second, cos, sin), axis=-1)


@rotary.source
def partial_by_halves(x: Any, cos: Any, sin: Any) -> Any:
    first, second, rest = op.Split(x, axis=-1, outputs=3)
    return op.Concat(*_turned_halves(first, second, cos, sin), rest, axis=-1)


@whole_by_halves.attributes
@partial_by_halves.attributes
def _(m: Match) -> dict[str, Any]:
    (halves,) = (node for node in m.region if node.is_a("Split"))
    return {"rotary_dim": sum(halves.attributes["split"][:2])}


@rotary.source
def standard(x: Any, cos: Any, sin: Any) -> Any:
    return op.RotaryEmbedding(x, cos, sin, interleaved=0, rotary_embedding_dim=capture("rotary_dim"))


@standard.attributes
def _(m: Match) -> dict[str, Any]:
    applies(m.x.rank == 4 and isinstance(m.x.shape[-1], int))
    return {"rotary_dim": m.attributes["rotary_dim"] or m.x.shape[-1]}


def _rows(table: Value) -> Shape | None:
    """[B, S, R] of a table that has a row for each position of each sequence, the same for all heads."""
    shape: Shape | None = table.shape
    return (shape[0], *shape[2:]) if shape is not None and len(shape) == 4 and shape[1] == 1 else shape


@rotary.lower("ort", opset=23)
def _(op: Any, x: Any, cos: Any, sin: Any, *, rotary_dim: int) -> Any:
    batch, heads, length, width = x.shape
    fitting = {_rows(cos), _rows(sin)} == {(batch, length, rotary_dim // 2)}
    # The operator has no float64; in float16 it rounds more than the nodes it replaces do.
    if op.opset < 23 or not fitting or not isinstance(heads, int) or x.dtype in (DType.FLOAT16, DType.FLOAT64):
        return rotary.lowerings["functions"](op, x, cos, sin, rotary_dim=rotary_dim)
    tables = (table if len(table.shape) == 3 else op.Squeeze(table, axes=(1,)) for table in (cos, sin))
    # Some versions of ONNX Runtime want the number of heads where not every channel turns.
    part = {} if rotary_dim == width else {"rotary_embedding_dim": rotary_dim, "num_heads": heads}
    return op.RotaryEmbedding(x, *tables, **part)


@rotary.lower("functions")
def _(op: Any, x: Any, cos: Any, sin: Any, *, rotary_dim: int) -> Any:
    cos, sin = (op.Unsqueeze(table, axes=(1,)) if len(table.shape) == 3 else table for table in (cos, sin))
    half, rest = rotary_dim // 2, x.shape[-1] - rotary_dim
    sizes = (half, half, rest) if rest else (half, half)
    first, second, *kept = op.Split(x, axis=-1, split=sizes, outputs=len(sizes))
    turned = op.Sub(op.Mul(first, cos), op.Mul(second, sin)), op.Add(op.Mul(second, cos), op.Mul(first, sin))
    return op.Concat(*turned, *kept, axis=-1)


_SIZES = {"B": 2, "H": 4, "S": 3, "Dh": 16}
rotary.examples(
    {**_SIZES, "C": ("B", 1, "S", 8), "rotary_dim": 16},
    {**_SIZES, "C": ("B", "S", 8), "rotary_dim": 16},
    {**_SIZES, "C": (1, 1, "S", 8), "rotary_dim": 16},
    {**_SIZES, "C": ("S", 8), "rotary_dim": 16},
    {**_SIZES, "C": ("B", 1, "S", 6), "rotary_dim": 12},
    {**_SIZES, "C": ("B", "S", 6), "rotary_dim": 12},
)
