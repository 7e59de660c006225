"""Operators that torch has with exactly ONNX's meaning: the expressions they are written as, for the types at hand.

What is not here, or returns None, is computed by the function of the operator table.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import sympy

from fuser.content import content
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.graph import FUSER, Node, Value


class Scope(Protocol):
    """What an expression is written in: gives the text that stands for a value, a dim, a shape."""

    opset: int

    def read(self, value: Value) -> str: ...
    def dim(self, dim: Dim) -> str: ...
    def shape(self, shape: Shape) -> str: ...
    def bound(self, item: Any, stem: str) -> str: ...
    def is_own(self, node: Node, dim: Dim) -> bool: ...


Expression = Callable[[Scope, Node], str | None]

DIRECT: dict[tuple[str, str], Expression] = {}

FLOATS = frozenset({DType.FLOAT32, DType.FLOAT64, DType.FLOAT16, DType.BFLOAT16})
# torch computes with few of the unsigned integers wider than 8 bits.
NUMBERS = FLOATS | {DType.INT8, DType.UINT8, DType.INT16, DType.INT32, DType.INT64}


def direct(*ops: str, domain: str = "") -> Callable[[Expression], Expression]:
    """Enters the decorated function under each of `ops`; it gives None where torch's meaning is another."""

    def enter(function: Expression) -> Expression:
        for op in ops:
            DIRECT[domain, op] = function
        return function

    return enter


def _types(node: Node) -> set[DType | None]:
    return {value.dtype if value is not None else None for value in node.inputs}


def _same(node: Node, allowed: frozenset[DType]) -> bool:
    """Whether all inputs have one type, and torch computes in it as ONNX does."""
    found = _types(node)
    return len(found) == 1 and found <= allowed


def number(value: Value, beside: Value) -> str | None:
    """The one number a constant holds, where it may stand beside another operand without changing its rank or type."""
    if value.constant is None or value.constant.size != 1 or value.scalar is None or beside.constant is not None:
        return None
    if value.rank != 0 and (beside.rank is None or beside.rank < (value.rank or 0)):
        return None
    if not math.isfinite(value.scalar) or (value.dtype not in FLOATS and abs(value.scalar) > 1 << 31):
        return None
    return repr(value.scalar if value.dtype in FLOATS else int(value.scalar))


def _operands(scope: Scope, node: Node) -> list[str]:
    a, b = (value for value in node.inputs if value is not None)
    return [number(a, b) or scope.read(a), number(b, a) or scope.read(b)]


@direct("Add", "Sub", "Mul")
def _arithmetic(scope: Scope, node: Node) -> str | None:
    if not _same(node, NUMBERS):
        return None
    sign = {"Add": "+", "Sub": "-", "Mul": "*"}[node.op]
    return f" {sign} ".join(_operands(scope, node))


@direct("Div")
def _divide(scope: Scope, node: Node) -> str | None:
    """By a tensor even where it holds one number: by a number, torch multiplies with its reciprocal."""
    a, b = node.inputs
    if not _same(node, FLOATS) or a is None or b is None:
        return None
    return f"{number(a, b) or scope.read(a)} / {scope.read(b)}"


@direct("Pow")
def _power(scope: Scope, node: Node) -> str | None:
    base, exponent = node.inputs
    if base is None or exponent is None or base.dtype not in FLOATS or exponent.constant is None:
        return None
    power = number(exponent, base)
    return None if power is None else f"torch.pow({scope.read(base)}, {float(power)!r})"


_COMPARISONS = {"Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge"}


@direct(*_COMPARISONS)
def _compare(scope: Scope, node: Node) -> str | None:
    if not _same(node, NUMBERS):
        return None
    a, b = _operands(scope, node)
    if not a.isidentifier():
        return None
    return f"torch.{_COMPARISONS[node.op]}({a}, {b})"


@direct("And", "Or", "Xor", "Not")
def _logic(scope: Scope, node: Node) -> str | None:
    if _types(node) != {DType.BOOL}:
        return None
    operands = ", ".join(scope.read(value) for value in node.inputs if value is not None)
    return f"torch.logical_{node.op.lower()}({operands})"


_UNARY = {
    "Abs": "abs", "Ceil": "ceil", "Cos": "cos", "Erf": "erf", "Exp": "exp", "Floor": "floor", "Log": "log", "Neg": "neg",
    "Reciprocal": "reciprocal", "Relu": "relu", "Sigmoid": "sigmoid", "Sin": "sin", "Sqrt": "sqrt", "Tanh": "tanh",
}  # fmt: skip


@direct(*_UNARY)
def _unary(scope: Scope, node: Node) -> str | None:
    return f"torch.{_UNARY[node.op]}({_first(scope, node)})" if _same(node, FLOATS) else None


@direct("Rsqrt", domain=FUSER)
def _rsqrt(scope: Scope, node: Node) -> str | None:
    return f"torch.rsqrt({_first(scope, node)})"


def _first(scope: Scope, node: Node) -> str:
    value = node.inputs[0]
    assert value is not None
    return scope.read(value)


@direct("Where")
def _where(scope: Scope, node: Node) -> str | None:
    condition, a, b = node.inputs
    if condition is None or a is None or b is None or a.dtype is None or a.dtype is not b.dtype:
        return None
    if condition.dtype is not DType.BOOL:
        return None
    return f"torch.where({scope.read(condition)}, {scope.read(a)}, {scope.read(b)})"


@direct("Identity")
def _identity(scope: Scope, node: Node) -> str | None:
    return _first(scope, node)


@direct("MatMul")
def _matmul(scope: Scope, node: Node) -> str | None:
    """Of float16 and bfloat16 too: torch sums in float32, and rounds once."""
    a, b = node.inputs
    if not _same(node, FLOATS) or a is None or b is None:
        return None
    return f"torch.matmul({scope.read(a)}, {scope.read(b)})"


@direct("Softmax")
def _softmax(scope: Scope, node: Node) -> str | None:
    if scope.opset < 13 or not _same(node, FLOATS):
        return None
    return f"torch.softmax({_first(scope, node)}, {int(node.attributes.get('axis', -1))})"


@direct("Cast")
def _cast(scope: Scope, node: Node) -> str | None:
    target = DType.from_onnx(int(node.attributes["to"]))
    known = NUMBERS | {DType.BOOL}
    return f"{_first(scope, node)}.to(torch.{target})" if target in known and _types(node) <= known else None


@direct("Transpose")
def _transpose(scope: Scope, node: Node) -> str | None:
    perm = node.attributes.get("perm")
    return None if perm is None else f"{_first(scope, node)}.permute({_ints(perm)})"


def _ints(items: Any) -> str:
    return "(" + "".join(f"{int(item)}, " for item in items).rstrip() + ")"


@direct("Reshape")
def _reshape(scope: Scope, node: Node) -> str | None:
    """To a shape that is known: of sizes, none of which stands for another."""
    wanted = node.attributes.get("shape")
    if len(node.inputs) != 1 or not isinstance(wanted, tuple):
        return None
    if any((isinstance(dim, int) and dim <= 0) or scope.is_own(node, dim) for dim in wanted):
        return None
    return f"{_first(scope, node)}.reshape({scope.shape(wanted)})"


@direct("Expand")
def _expand(scope: Scope, node: Node) -> str | None:
    wanted, value = node.attributes.get("shape"), node.inputs[0]
    if len(node.inputs) != 1 or value is None or value.shape is None or not isinstance(wanted, tuple):
        return None
    if node.output.shape != wanted or len(value.shape) > len(wanted):
        return None
    fits = all(dim in (1, size) for dim, size in zip(reversed(value.shape), reversed(wanted), strict=False))
    return f"{scope.read(value)}.expand({scope.shape(wanted)})" if fits else None


@direct("Unsqueeze", "Squeeze")
def _one_axis(scope: Scope, node: Node) -> str | None:
    """One axis at a time; where it is squeezed, its size must be known to be 1."""
    axes = node.attributes.get("axes") if len(node.inputs) == 1 else content(node.inputs[1])
    value = node.inputs[0]
    if not isinstance(axes, tuple) or len(axes) != 1 or not isinstance(axes[0], int) or value is None:
        return None
    if node.op == "Squeeze" and (value.shape is None or not _is_one(value.shape, axes[0])):
        return None
    return f"{scope.read(value)}.{node.op.lower()}({axes[0]})"


def _is_one(shape: Shape, axis: int) -> bool:
    return -len(shape) <= axis < len(shape) and shape[axis] == 1


@direct("Concat")
def _concat(scope: Scope, node: Node) -> str | None:
    if len(_types(node)) != 1 or None in _types(node) or any(v is None or v.rank is None for v in node.inputs):
        return None
    parts = ", ".join(scope.read(value) for value in node.inputs if value is not None)
    return f"torch.cat(({parts},), {int(node.attributes['axis'])})"


@direct("Split")
def _split(scope: Scope, node: Node) -> str | None:
    sizes = node.attributes.get("split")
    if len(node.inputs) != 1 or not isinstance(sizes, tuple) or len(sizes) != len(node.outputs):
        return None
    return f"torch.split({_first(scope, node)}, {scope.shape(sizes)}, {int(node.attributes.get('axis', 0))})"


@direct("Slice")
def _slice(scope: Scope, node: Node) -> str | None:
    value, given = node.inputs[0], node.attributes
    if len(node.inputs) != 1 or value is None or value.rank is None or "starts" not in given:
        return None
    steps = given.get("steps") or (1,) * len(given["starts"])
    axes = given.get("axes") or tuple(range(len(given["starts"])))
    along = [axis % value.rank for axis in axes]
    if not all(isinstance(step, int) and step > 0 for step in steps) or len(set(along)) != len(along):
        return None
    parts = [":"] * value.rank
    for axis, start, end, step in zip(along, given["starts"], given["ends"], steps, strict=True):
        last = "" if isinstance(end, int) and end >= 1 << 31 else scope.dim(end)
        parts[axis] = f"{scope.dim(start)}:{last}" + (f":{step}" if step != 1 else "")
    return f"{scope.read(value)}[{', '.join(parts)}]"


@direct("Gather")
def _gather(scope: Scope, node: Node) -> str | None:
    data, indices = node.inputs
    axis = int(node.attributes.get("axis", 0))
    if data is None or indices is None or indices.dtype not in (DType.INT64, DType.INT32):
        return None
    at = content(indices)
    if isinstance(at, int):
        return f"{scope.read(data)}.select({axis}, {at})"
    return f"{scope.read(data)}[{scope.read(indices)}]" if axis == 0 and indices.rank is not None else None


@direct("ReduceMean", "ReduceSum")
def _reduce(scope: Scope, node: Node) -> str | None:
    axes = node.attributes.get("axes")
    if len(node.inputs) != 1 or not axes or not _same(node, FLOATS) or node.inputs[0].rank in (None, 0):  # type: ignore[union-attr]
        return None
    name = node.op.removeprefix("Reduce").lower()
    return f"torch.{name}({_first(scope, node)}, {_ints(axes)}, {bool(node.attributes.get('keepdims', 1))})"


@direct("ConstantOfShape")
def _filled(scope: Scope, node: Node) -> str | None:
    shape = node.attributes.get("shape") if not node.inputs else content(node.inputs[0])
    fill = node.attributes.get("value")
    dtype = DType.FLOAT32 if fill is None else fill.dtype
    filling = 0.0 if fill is None else fill.scalar
    if not isinstance(shape, tuple) or filling is None or dtype not in NUMBERS | {DType.BOOL}:
        return None
    if any(not isinstance(dim, (int, sympy.Expr)) for dim in shape):
        return None
    held = scope.bound(filling if dtype in FLOATS else bool(filling) if dtype is DType.BOOL else int(filling), "fill")
    return f"torch.full({scope.shape(shape)}, {held}, dtype=torch.{dtype}, device=device)"
