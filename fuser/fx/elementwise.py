"""Arithmetic, comparison, logic, activations and casts."""

import math
from collections.abc import Callable
from typing import Any

from fuser.dtypes import DType
from fuser.errors import UnsupportedOperator
from fuser.fx.table import At, Number, Row, aten
from fuser.graph import FUSER, Value

Operand = Value | Number

_SAME = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh", "atan": "Atan", "atanh": "Atanh",
    "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh", "erf": "Erf", "exp": "Exp", "floor": "Floor", "hardswish": "HardSwish",
    "log": "Log", "mish": "Mish", "neg": "Neg", "reciprocal": "Reciprocal", "relu": "Relu", "round": "Round",
    "sigmoid": "Sigmoid", "sin": "Sin", "sinh": "Sinh", "sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh",
}  # fmt: skip
_EXACT = frozenset({"Ceil", "Floor", "Round"})  # what integers are already


def _unary(op: str) -> Row:
    def row(at: At, x: Value) -> Value:
        if op in _EXACT and x.dtype is not None and not x.dtype.is_float:
            return x
        return at.op(op, at.cast(x, at.dtype))

    return row


for _name, _op in _SAME.items():
    aten(f"{_name}.default")(_unary(_op))


@aten("rsqrt.default")
def rsqrt(at: At, x: Value) -> Value:
    return at.op("Rsqrt", at.cast(x, at.dtype), domain=FUSER)


@aten("sign.default")
def sign(at: At, x: Value) -> Value:
    """That of NaN is zero, which ONNX's Sign leaves open."""
    if at.dtype is DType.BOOL:
        return x
    if not at.dtype.is_float:
        return at.op("Sign", x)
    zero = at.scalar(0, at.dtype)
    above, below = (at.cast(at.op(op, x, zero), at.dtype) for op in ("Greater", "Less"))
    return at.op("Sub", above, below)


@aten("square.default")
def square(at: At, x: Value) -> Value:
    return at.op("Mul", x, x)


@aten("expm1.default")
def expm1(at: At, x: Value) -> Value:
    return at.op("Sub", at.op("Exp", at.cast(x, at.dtype)), at.constant(1, at.dtype))


@aten("log1p.default")
def log1p(at: At, x: Value) -> Value:
    return at.op("Log", at.op("Add", at.cast(x, at.dtype), at.constant(1, at.dtype)))


@aten("exp2.default")
def exp2(at: At, x: Value) -> Value:
    return at.op("Pow", at.constant(2.0, at.dtype), at.cast(x, at.dtype))


@aten("log2.default")
def log2(at: At, x: Value) -> Value:
    return at.op("Mul", at.op("Log", at.cast(x, at.dtype)), at.constant(1 / math.log(2), at.dtype))


@aten("log10.default")
def log10(at: At, x: Value) -> Value:
    return at.op("Mul", at.op("Log", at.cast(x, at.dtype)), at.constant(1 / math.log(10), at.dtype))


@aten("trunc.default")
def trunc(at: At, x: Value) -> Value:
    return _toward_zero(at, x) if at.dtype.is_float else x


def _toward_zero(at: At, x: Value) -> Value:
    below = at.op("Less", x, at.constant(0, at.dtype))
    return at.op("Where", below, at.op("Ceil", x), at.op("Floor", x))


@aten("add.Tensor", "add.Scalar")
def add(at: At, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _linear(at, "Add", x, y, alpha)


@aten("sub.Tensor", "sub.Scalar")
def sub(at: At, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _linear(at, "Sub", x, y, alpha)


@aten("rsub.Tensor", "rsub.Scalar")
def rsub(at: At, x: Operand, y: Operand, alpha: Number = 1) -> Value:
    return _linear(at, "Sub", y, _times(at, x, alpha), 1)


def _times(at: At, x: Operand, factor: Number) -> Operand:
    return x if factor == 1 else at.op("Mul", at.operand(x, at.dtype), at.scalar(factor, at.dtype))


def _linear(at: At, op: str, x: Operand, y: Operand, alpha: Number) -> Value:
    if at.dtype is DType.BOOL:
        if op == "Sub":
            raise UnsupportedOperator("booleans are not subtracted")
        return at.op("Or", at.operand(x, DType.BOOL), at.operand(y, DType.BOOL))
    return at.op(op, at.operand(x, at.dtype), at.operand(_times(at, y, alpha), at.dtype))


@aten("mul.Tensor", "mul.Scalar")
def mul(at: At, x: Operand, y: Operand) -> Value:
    op = "And" if at.dtype is DType.BOOL else "Mul"
    return at.op(op, at.operand(x, at.dtype), at.operand(y, at.dtype))


@aten("div.Tensor", "div.Scalar", "true_divide.Tensor")
def div(at: At, x: Operand, y: Operand) -> Value:
    return at.op("Div", at.operand(x, at.dtype), at.operand(y, at.dtype))


@aten("div.Tensor_mode", "div.Scalar_mode")
def div_rounded(at: At, x: Operand, y: Operand, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return div(at, x, y)
    a, b = at.operand(x, at.dtype), at.operand(y, at.dtype)
    if rounding_mode == "floor":
        if at.dtype.is_float:
            return at.op("Floor", at.op("Div", a, b))
        return at.op("Div", at.op("Sub", a, at.op("Mod", a, b)), b)
    quotient = at.op("Div", a, b)
    return _toward_zero(at, quotient) if at.dtype.is_float else quotient


@aten("floor_divide.default", "floor_divide.Scalar")
def floor_divide(at: At, x: Operand, y: Operand) -> Value:
    return div_rounded(at, x, y, "floor")


@aten("remainder.Tensor", "remainder.Scalar")
def remainder(at: At, x: Operand, y: Operand) -> Value:
    a, b = at.operand(x, at.dtype), at.operand(y, at.dtype)
    if not at.dtype.is_float:
        return at.op("Mod", a, b)
    return at.op("Sub", a, at.op("Mul", at.op("Floor", at.op("Div", a, b)), b))


@aten("fmod.Tensor", "fmod.Scalar")
def fmod(at: At, x: Operand, y: Operand) -> Value:
    return at.op("Mod", at.operand(x, at.dtype), at.operand(y, at.dtype), fmod=1)


@aten("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def power(at: At, x: Operand, y: Operand) -> Value:
    return at.op("Pow", at.operand(x, at.dtype), at.operand(y, at.dtype))


@aten("maximum.default", "max.other")
def maximum(at: At, x: Value, y: Value) -> Value:
    return at.op("Max", at.operand(x, at.dtype), at.operand(y, at.dtype))


@aten("minimum.default", "min.other")
def minimum(at: At, x: Value, y: Value) -> Value:
    return at.op("Min", at.operand(x, at.dtype), at.operand(y, at.dtype))


def _comparison(op: str) -> Callable[[At, Operand, Operand], Value]:
    def row(at: At, x: Operand, y: Operand) -> Value:
        dtype = at.promoted(x, y)
        if dtype is DType.BOOL and op != "Equal":
            dtype = DType.INT32  # ONNX orders numbers only
        return at.op(op, at.operand(x, dtype), at.operand(y, dtype))

    return row


for _name, _op in {
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}.items():
    aten(f"{_name}.Tensor", f"{_name}.Scalar")(_comparison(_op))


@aten("ne.Tensor", "ne.Scalar")
def unequal(at: At, x: Operand, y: Operand) -> Value:
    return at.op("Not", _comparison("Equal")(at, x, y))


def _logical(op: str) -> Row:
    def row(at: At, x: Value, y: Value) -> Value:
        return at.op(op, at.cast(x, DType.BOOL), at.cast(y, DType.BOOL))

    return row


for _name, _op in {"and": "And", "or": "Or", "xor": "Xor"}.items():
    aten(f"logical_{_name}.default")(_logical(_op))


def _bitwise(op: str) -> Row:
    def row(at: At, x: Operand, y: Operand) -> Value:
        spelled = op if at.dtype is DType.BOOL else f"Bitwise{op}"
        return at.op(spelled, at.operand(x, at.dtype), at.operand(y, at.dtype))

    return row


for _name, _op in {"and": "And", "or": "Or", "xor": "Xor"}.items():
    aten(*(f"{spelling}.{kind}" for spelling in (f"bitwise_{_name}", f"__{_name}__") for kind in ("Tensor", "Scalar")))(
        _bitwise(_op)
    )


@aten("logical_not.default")
def logical_not(at: At, x: Value) -> Value:
    return at.op("Not", at.cast(x, DType.BOOL))


@aten("bitwise_not.default")
def bitwise_not(at: At, x: Value) -> Value:
    return at.op("Not" if x.dtype is DType.BOOL else "BitwiseNot", x)


@aten("isnan.default")
def isnan(at: At, x: Value) -> Value:
    return at.op("IsNaN", x if x.dtype is not None and x.dtype.is_float else at.cast(x, DType.FLOAT32))


@aten("isinf.default")
def isinf(at: At, x: Value) -> Value:
    return at.op("IsInf", x if x.dtype is not None and x.dtype.is_float else at.cast(x, DType.FLOAT32))


@aten("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(at: At, condition: Value, x: Operand, y: Operand) -> Value:
    return at.op("Where", at.cast(condition, DType.BOOL), at.operand(x, at.dtype), at.operand(y, at.dtype))


@aten("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(at: At, x: Value, mask: Value, value: Operand) -> Value:
    return at.op("Where", mask, at.operand(value, at.dtype), at.cast(x, at.dtype))


@aten("clamp.default", "clamp.Tensor")
def clamp(at: At, x: Value, min: Operand | None = None, max: Operand | None = None) -> Value:
    """The upper bound wins where the two cross, as in ATen."""
    y = at.cast(x, at.dtype)
    if min is not None:
        y = at.op("Max", y, at.operand(min, at.dtype))
    return y if max is None else at.op("Min", y, at.operand(max, at.dtype))


@aten("clamp_min.default")
def clamp_min(at: At, x: Value, min: Operand) -> Value:
    return clamp(at, x, min=min)


@aten("clamp_max.default")
def clamp_max(at: At, x: Value, max: Operand) -> Value:
    return clamp(at, x, max=max)


@aten("addcmul.default")
def addcmul(at: At, x: Value, a: Value, b: Value, value: Number = 1) -> Value:
    product = at.op("Mul", at.cast(a, at.dtype), at.cast(b, at.dtype))
    return at.op("Add", at.cast(x, at.dtype), at.operand(_times(at, product, value), at.dtype))


@aten("silu.default")
def silu(at: At, x: Value) -> Value:
    return at.op("Mul", x, at.op("Sigmoid", x))


@aten("gelu.default")
def gelu(at: At, x: Value, approximate: str = "none") -> Value:
    return at.op("Gelu", x, approximate=approximate)


@aten("softplus.default")
def softplus(at: At, x: Value, beta: Number = 1, threshold: Number = 20) -> Value:
    """Beyond the threshold it is x itself."""
    scaled = at.operand(_times(at, x, beta), at.dtype)
    smooth = at.op("Softplus", scaled)
    if beta != 1:
        smooth = at.op("Div", smooth, at.scalar(beta, at.dtype))
    return at.op("Where", at.op("Greater", scaled, at.scalar(threshold, at.dtype)), x, smooth)


@aten("leaky_relu.default")
def leaky_relu(at: At, x: Value, negative_slope: float = 0.01) -> Value:
    return at.op("LeakyRelu", x, alpha=float(negative_slope))


@aten("elu.default")
def elu(at: At, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    if scale != 1 or input_scale != 1:
        raise UnsupportedOperator("elu with scales")
    return at.op("Elu", x, alpha=float(alpha))


@aten("hardtanh.default")
def hardtanh(at: At, x: Value, min_val: Number = -1, max_val: Number = 1) -> Value:
    return clamp(at, x, min_val, max_val)


@aten("relu6.default")
def relu6(at: At, x: Value) -> Value:
    return clamp(at, x, 0, 6)


@aten("hardsigmoid.default")
def hardsigmoid(at: At, x: Value) -> Value:
    return at.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@aten("to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "type_as.default")
def to(at: At, x: Value, *others: Any, **placement: Any) -> Value:
    """Of all it may say the type alone matters, which the result has."""
    return at.cast(x, at.dtype)


@aten(
    "alias.default", "clone.default", "contiguous.default", "detach.default", "detach_.default", 
    "lift_fresh_copy.default", "positive.default",
)  # fmt: skip
def same(at: At, x: Value) -> Value:
    return x


@aten("dropout.default", "feature_dropout.default")
def dropout(at: At, x: Value, p: float, train: bool) -> Value:
    if train and p:
        raise UnsupportedOperator("dropout in training mode; call module.eval() first")
    return x
