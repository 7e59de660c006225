"""Elementwise operators: arithmetic, comparison, logic and activations, with numpy's broadcasting."""

from collections.abc import Callable, Mapping
from functools import reduce

import torch
import torch.nn.functional as functional
from torch import Tensor

from fuser.errors import UnsupportedOperator
from fuser.operators.table import float32, operator, same_dtype, scalar_like, wide

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch stores them and computes with few


def _signed(*tensors: Tensor) -> list[Tensor]:
    """The tensors, with unsigned integers wider than 8 bits as int64: exact up to 2**63 - 1, refused beyond."""
    out = [x.to(torch.int64) if x.dtype in _UNSIGNED else x for x in tensors]
    if any(x.dtype is torch.uint64 and bool((y < 0).any()) for x, y in zip(tensors, out, strict=True)):
        raise UnsupportedOperator("uint64 values must be below 2**63")
    return out


def _arithmetic(name: str, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    @operator(name)
    def _(a: Tensor, b: Tensor) -> Tensor:
        same_dtype(a, b)
        return compute(*_signed(a, b)).to(a.dtype)


def _predicate(name: str, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    @operator(name)
    def _(a: Tensor, b: Tensor) -> Tensor:
        same_dtype(a, b)
        return compute(*_signed(a, b))


def _unary(name: str, compute: Callable[[Tensor], Tensor]) -> None:
    """float16 and bfloat16 are computed in float32 and rounded once."""

    @operator(name)
    def _(x: Tensor) -> Tensor:
        return compute(*_signed(wide(x))).to(x.dtype)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


_ARITHMETIC: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": _divide,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
}

_PREDICATES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # torch's softplus is only x itself beyond a threshold


_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1),
    "Log": torch.log,
    "Mish": lambda x: x * torch.tanh(_softplus(x)),
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,  # half to even
    "Sigmoid": torch.sigmoid,
    "Sign": lambda x: torch.where(x == x, torch.sign(x), x),  # NaN stays
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": _softplus,
    "Softsign": lambda x: x / (1 + x.abs()),
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

for _name, _binary in _ARITHMETIC.items():
    _arithmetic(_name, _binary)
for _name, _binary in _PREDICATES.items():
    _predicate(_name, _binary)
for _name, _function in _UNARY.items():
    _unary(_name, _function)


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    return x


@operator("Pow")
def power(base: Tensor, exponent: Tensor) -> Tensor:
    """The output has the base's dtype, whatever the exponent's."""
    x, y = _signed(base, exponent)
    common = torch.promote_types(x.dtype, y.dtype)
    if y.dtype.is_floating_point and not x.dtype.is_floating_point:
        common = torch.float64
    return torch.pow(x.to(common), y.to(common)).to(base.dtype)


@operator("Mod")
def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The sign of the result is the divisor's, or with fmod the dividend's."""
    x, y = _signed(a, b)
    return (torch.fmod(x, y) if fmod else torch.remainder(x, y)).to(a.dtype)


@operator("BitShift")
def bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    a, b = _signed(x, y)
    shift = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    return shift(a, b).to(x.dtype)


@operator("Where")
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    same_dtype(x, y)
    return torch.where(condition, x, y)


@operator("IsNaN")
def is_nan(x: Tensor) -> Tensor:
    return torch.isnan(x)


@operator("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    return torch.isinf(x) & ((x < 0) & bool(detect_negative) | (x > 0) & bool(detect_positive))


@operator("Sum")
def variadic_sum(*terms: Tensor) -> Tensor:
    same_dtype(*terms)
    return reduce(torch.add, map(wide, terms)).to(terms[0].dtype)


@operator("Mean")
def variadic_mean(*terms: Tensor) -> Tensor:
    same_dtype(*terms)
    return (reduce(torch.add, map(wide, terms)) / len(terms)).to(terms[0].dtype)


@operator("Max")
def variadic_max(*terms: Tensor) -> Tensor:
    same_dtype(*terms)
    return reduce(torch.maximum, _signed(*terms)).to(terms[0].dtype)


@operator("Min")
def variadic_min(*terms: Tensor) -> Tensor:
    same_dtype(*terms)
    return reduce(torch.minimum, _signed(*terms)).to(terms[0].dtype)


@operator("Clip")
def clip(x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    """max wins where min > max. A bound beyond the dtype's range becomes infinite."""
    (out,) = _signed(x)
    if min is not None:
        out = torch.maximum(out, scalar_like(min, out))
    if max is not None:
        out = torch.minimum(out, scalar_like(max, out))
    return out.to(x.dtype)


@operator("Dropout")
def dropout(
    x: Tensor, ratio: Tensor | float | None = None, training_mode: Tensor | None = None, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """The identity, and a mask of True; dropping anything is refused."""
    if training_mode is not None and bool(training_mode) and (ratio is None or float(ratio) > 0):
        raise UnsupportedOperator("training_mode with a ratio above zero")
    return x, torch.ones_like(x, dtype=torch.bool)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = float32(0.01)) -> Tensor:
    return torch.where(x < 0, alpha * x, x)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    y = wide(x)
    return torch.where(y < 0, alpha * torch.expm1(y), y).to(x.dtype)


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    y = wide(x)
    return torch.where(y < 0, alpha * torch.expm1(y / alpha), y).to(x.dtype)


@operator("Selu")
def selu(
    x: Tensor, *, alpha: float = float32(1.6732632423543772), gamma: float = float32(1.0507009873554805)
) -> Tensor:
    y = wide(x)
    return (gamma * torch.where(y > 0, y, alpha * torch.expm1(y))).to(x.dtype)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = float32(0.2), beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * wide(x) + beta, 0, 1).to(x.dtype)


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x Phi(x), or its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return functional.gelu(wide(x), approximate=approximate).to(x.dtype)


@operator("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    y = wide(x)
    return (y * torch.sigmoid(alpha * y)).to(x.dtype)


@operator("SwiGLU")
def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """swish(a) b, for a gate a."""
    same_dtype(a, b)
    return (swish(wide(a), alpha=alpha) * wide(b)).to(a.dtype)
