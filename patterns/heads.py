"""The two arrangements of queries, keys and values: tokens [B, S, heads * Dh] and heads [B, heads, S, Dh]."""

from typing import Any

from torch import Tensor

from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.graph import Value
from fuser.pattern import Pattern, either, op, require


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * Dh] as [B, heads, S, Dh]; four dims stay."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def shape_by_head(shape: Shape, heads: int) -> Shape:
    """The shape of `by_head`."""
    if len(shape) == 4:
        return shape
    assert isinstance(shape[2], int)
    return (shape[0], heads, shape[1], shape[2] // heads)


def split_heads(x: Any) -> Pattern:
    """In a pattern: tokens arranged by head, or what is so arranged already."""
    return either(op.Transpose(op.Reshape(x), perm=(0, 2, 1, 3)), x)


def require_heads(operator: str, name: str, value: Value | None, heads: int | None = None) -> None:
    """Refuses what is not [B, S, heads * width] or [B, heads, S, width] of known heads and width."""
    shape = (value.shape if value is not None else None) or ()
    if len(shape) == 4:
        fits = isinstance(shape[1], int) and isinstance(shape[3], int) and heads in (None, shape[1])
    else:
        fits = len(shape) == 3 and isinstance(shape[2], int) and heads is not None and shape[2] % heads == 0
    count = "heads" if heads is None else heads
    require(fits, f"{operator}: {name} must be [B, {count}, tokens, width] or [B, tokens, {count} * width]", value)


def arranged(op: Any, x: Any, heads: int) -> Any:
    """`by_head` in ONNX."""
    if len(x.shape) == 4:
        return x
    split = op.Reshape(x, op.constant((0, 0, heads, x.shape[2] // heads), DType.INT64))
    return op.Transpose(split, perm=(0, 2, 1, 3))


def as_tokens(op: Any, x: Any) -> Any:
    """[B, heads, S, width] as [B, S, heads * width] in ONNX; what was arranged by head a moment ago is taken from there."""
    if len(x.shape) == 3:
        return x
    turn = x.producer
    rows = (
        turn.inputs[0]
        if turn is not None and turn.is_a("Transpose") and turn.attributes.get("perm") == (0, 2, 1, 3)
        else None
    )
    if rows is None:
        rows = op.Transpose(x, perm=(0, 2, 1, 3))
    split = rows.producer
    whole = split.inputs[0] if split is not None and split.is_a("Reshape") else None
    if whole is not None and whole.rank == 3 and whole.shape[:2] == rows.shape[:2]:
        return whole
    return op.Reshape(rows, op.constant((0, 0, rows.shape[2] * rows.shape[3]), DType.INT64))
