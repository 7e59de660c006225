"""Every row of the FX importer's table against torch: exported alone, read into a graph, and run at other sizes.

A case is an operator, its tensors as text (`f[a,3] i[]`: a type's letter and a shape, letters being dynamic sizes), and what
follows the tensors, or a function that calls the operator.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuser.canonicalize import canonicalize
from fuser.fx import export_module, import_program
from fuser.fx.table import ROWS
from fuser.runtime.executor import Executor
from tests.test_operators import error_of

Case = tuple[str, str, Callable[..., Any]]
EXAMPLE = {"a": 3, "b": 5, "c": 4}
OTHERS = ({"a": 4, "b": 2, "c": 7}, {"a": 1, "b": 6, "c": 1}, {"a": 7, "b": 3, "c": 9})


def case(names: str, tensors: str, *rest: Any, **options: Any) -> list[Case]:
    """One case for each of some operators."""
    if rest and callable(rest[0]) and not isinstance(rest[0], torch.dtype):
        return [(name, tensors, rest[0]) for name in names.split()]
    return [(name, tensors, lambda op, *given: op(*given, *rest, **options)) for name in names.split()]


def drawn(tensors: str, sizes: Mapping[str, int]) -> list[Tensor]:
    """f float32, d float64, h float16, i int64, j int32, u uint8, b bool; p positive, o at most one in magnitude, w infinite
    and NaN as well, z integers other than zero, n indices into at least two, m the same from both ends."""
    random = torch.Generator().manual_seed(len(tensors) + sum(sizes.values()))
    found = []
    for text in tensors.split():
        kind, dims = text[0], [part for part in text[2:-1].split(",") if part]
        shape = [sizes[dim] if dim in sizes else int(dim) for dim in dims]
        normal, whole = torch.randn(shape, generator=random), torch.randint(1, 6, shape, generator=random)
        found.append(
            {
                "f": lambda x, n: 2 * x,
                "d": lambda x, n: 2 * x.double(),
                "h": lambda x, n: x.half(),
                "p": lambda x, n: x.abs() + 0.1,
                "o": lambda x, n: torch.tanh(x),
                "w": lambda x, n: torch.where(n == 1, torch.inf, torch.where(n == 2, torch.nan, x)),
                "i": lambda x, n: (n - 3) * x.sign().long(),
                "j": lambda x, n: ((n - 3) * x.sign().long()).int(),
                "u": lambda x, n: (40 * n).byte(),
                "b": lambda x, n: x > 0,
                "z": lambda x, n: n * x.sign().long(),
                "n": lambda x, n: n % 2,
                "m": lambda x, n: n % 2 - 2 * (x > 0).long(),
            }[kind](normal, whole)
        )
    return found


F = torch.nn.functional
SMOOTH = (
    "cos.default erf.default exp.default neg.default sigmoid.default sin.default sinh.default cosh.default tanh.default"
)
COMPARED = "eq lt le gt ge ne"
BITWISE = "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__"


def each(names: str, *overloads: str) -> str:
    return " ".join(f"{name}.{overload}" for name in names.split() for overload in overloads)


ARITHMETIC: list[list[Case]] = [
    case(
        f"{SMOOTH} abs.default atan.default asinh.default tan.default square.default expm1.default exp2.default",
        "f[a,b,3]",
    ),
    case(
        "exp.default sigmoid.default sin.default tanh.default atan.default erf.default cos.default expm1.default",
        "i[a,b]",
    ),
    case("abs.default neg.default sign.default square.default relu.default", "i[a,b]"),
    case("abs.default neg.default sign.default square.default", "j[a,0]"),
    case("abs.default sign.default square.default relu.default", "u[a]"),
    case("ceil.default floor.default round.default", "i[a,b]"),
    case("ceil.default floor.default round.default sign.default relu.default hardswish.default mish.default", "f[a,b]"),
    case("trunc.default", "f[a,b]"),
    case("trunc.default", "i[a,b]"),
    case("round.default", "", lambda op, *_: op(torch.tensor([0.5, 1.5, -0.5, 2.5]))),
    case("acos.default asin.default atanh.default", "o[a,b]"),
    case(
        "log.default sqrt.default rsqrt.default reciprocal.default log1p.default log2.default log10.default acosh.default",
        "p[a,b]",
    ),
    case("log.default sqrt.default rsqrt.default log2.default log1p.default reciprocal.default", "z[a,b]"),
    case("sigmoid.default exp.default rsqrt.default exp2.default tanh.default", "b[a]"),
    case("exp.default sqrt.default silu.default gelu.default relu.default sigmoid.default", "f[]"),
    case("log.default rsqrt.default sigmoid.default exp.default", "d[a,b]"),
    case("sign.default relu.default abs.default", "w[a,b]"),
    case("add.Tensor sub.Tensor mul.Tensor div.Tensor rsub.Tensor true_divide.Tensor", "f[a,b] p[b]"),
    case("add.Tensor sub.Tensor mul.Tensor div.Tensor rsub.Tensor", "i[a,1] z[b]"),
    case("add.Tensor sub.Tensor mul.Tensor div.Tensor true_divide.Tensor", "h[a,b] p[]"),
    case("add.Tensor mul.Tensor div.Tensor sub.Tensor rsub.Tensor", "i[] p[b]"),
    case("add.Tensor mul.Tensor", "b[a,b] b[b]"),
    case("add.Tensor mul.Tensor", "b[a,b] i[b]"),
    case("add.Tensor mul.Tensor", "j[a,b] i[]"),
    case("add.Tensor mul.Tensor sub.Tensor", "u[a,b] j[b]"),
    case("add.Tensor sub.Tensor rsub.Tensor", "i[a,b] i[b]", alpha=3),
    case("add.Tensor sub.Tensor rsub.Tensor", "f[a,b] i[b]", alpha=0.5),
    case("add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar", "f[a,b]", 3),
    case("add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar", "i[a,b]", 3),
    case("add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar", "j[a,0]", 2.5),
    case("add.Scalar mul.Scalar", "b[a]", True),
    case("add.Scalar mul.Scalar", "b[a]", 2),
    case("add.Scalar sub.Scalar rsub.Scalar", "f[a,b]", 3, 2),
    case("add.Tensor mul.Tensor sub.Tensor", "i[a,b]", lambda op, x: op(x, x.shape[1])),
    case("div.Tensor_mode", "f[a,b] p[b]", rounding_mode="floor"),
    case("div.Tensor_mode", "f[a,b] p[b]", rounding_mode="trunc"),
    case("div.Tensor_mode", "f[a,b] p[b]", rounding_mode=None),
    case("div.Tensor_mode", "i[a,b] z[b]", rounding_mode="floor"),
    case("div.Tensor_mode", "i[a,b] z[b]", rounding_mode="trunc"),
    case("div.Tensor_mode", "i[a,b] z[b]", rounding_mode=None),
    case("div.Tensor_mode", "i[a,b] p[b]", rounding_mode="floor"),
    case("div.Scalar_mode", "i[a,b]", -2, rounding_mode="floor"),
    case("div.Scalar_mode", "i[a,b]", -2, rounding_mode="trunc"),
    case("div.Scalar_mode", "f[a,b]", 0.7, rounding_mode="floor"),
    case("floor_divide.default", "i[a,b] z[b]"),
    case("floor_divide.default", "f[a,b] p[b]"),
    case("floor_divide.default", "u[a,b] u[b]"),
    case("floor_divide.Scalar", "i[a,b]", -3),
    case("floor_divide.Scalar", "f[a,b]", 0.7),
    case("remainder.Tensor fmod.Tensor", "i[a,b] z[b]"),
    case("remainder.Tensor fmod.Tensor", "f[a,b] p[b]"),
    case("remainder.Scalar fmod.Scalar", "f[a,b]", -0.7),
    case("remainder.Scalar fmod.Scalar", "i[a,b]", -3),
    case("remainder.Scalar fmod.Scalar", "i[a,b]", 1.5),
    case("pow.Tensor_Scalar", "f[a,b]", 2),
    case("pow.Tensor_Scalar", "i[a,b]", 3),
    case("pow.Tensor_Scalar", "p[a,b]", 0.5),
    case("pow.Tensor_Scalar", "p[a,b]", -0.5),
    case("pow.Tensor_Scalar", "z[a,b]", 1.5 - 2.5),
    case("pow.Tensor_Tensor", "p[a,b] f[b]"),
    case("pow.Tensor_Tensor", "i[a,b] u[b]"),
    case("pow.Tensor_Tensor", "p[a,1] i[b]"),
    case("pow.Scalar", "f[a,b]", lambda op, x: op(2, x)),
    case("pow.Scalar", "u[a]", lambda op, x: op(2, x // 40)),
    case("pow.Scalar", "i[a,b]", lambda op, x: op(1.5, x)),
    case("maximum.default max.other minimum.default min.other", "f[a,b] f[b]"),
    case("maximum.default max.other minimum.default min.other", "w[a,b] f[b]"),
    case("maximum.default max.other minimum.default min.other", "i[a,1] j[b]"),
    case("maximum.default minimum.default", "b[a,b] b[b]"),
    case("clamp.default", "f[a,b]", -0.5, 0.25),
    case("clamp.default", "f[a,b]", 1, 0),
    case("clamp.default", "i[a,b]", None, 2),
    case("clamp.default", "i[a,b]", 0.5),
    case("clamp.default", "w[a,b]", 0),
    case("clamp.Tensor", "f[a,b] f[b] f[]"),
    case("clamp.Tensor", "i[a,b]", lambda op, x: op(x, max=x[:1])),
    case("clamp_min.default clamp_max.default", "f[a,b]", 0.5),
    case("clamp_min.default clamp_max.default", "i[a,b]", 1),
    case("clamp_min.default clamp_max.default", "i[a,b]", 0.5),
    case("addcmul.default", "f[a,b] f[b] f[a,1]"),
    case("addcmul.default", "f[a,b] f[b] f[a,1]", value=0.3),
    case("addcmul.default", "i[a,b] i[b] i[a,1]", value=2),
]
LOGIC: list[list[Case]] = [
    case(each(COMPARED, "Tensor"), "i[a,b] i[b]"),
    case(each(COMPARED, "Tensor"), "w[a,b] i[b]"),
    case(each(COMPARED, "Tensor"), "b[a,b] b[b]"),
    case(each(COMPARED, "Tensor"), "u[a,b] j[]"),
    case(each(COMPARED, "Scalar"), "i[a,b]", 1),
    case(each(COMPARED, "Scalar"), "i[a,b]", 0.5),
    case(each(COMPARED, "Scalar"), "f[a,0]", 0),
    case(each(COMPARED, "Scalar"), "b[a,b]", True),
    case(each(COMPARED, "Scalar"), "b[a,b]", 1),
    case("eq.Scalar ne.Scalar lt.Scalar", "i[a,b]", lambda op, x: op(x, x.shape[0] - 3)),
    case("logical_and.default logical_or.default logical_xor.default", "b[a,b] b[b]"),
    case("logical_and.default logical_or.default logical_xor.default", "i[a,b] f[b]"),
    case("logical_not.default bitwise_not.default", "b[a,b]"),
    case("logical_not.default bitwise_not.default", "i[a,b]"),
    case("logical_not.default", "w[a,b]"),
    case(each(BITWISE, "Tensor"), "b[a,b] b[b]"),
    case(each(BITWISE, "Tensor"), "i[a,b] j[b]"),
    case(each(BITWISE, "Tensor"), "b[a,b] u[b]"),
    case(each(BITWISE, "Scalar"), "b[a,b]", True),
    case(each(BITWISE, "Scalar"), "i[a,b]", 6),
    case("isnan.default isinf.default", "w[a,b]"),
    case("isnan.default isinf.default", "i[a,b]"),
    case("where.self", "b[a,b] f[b] f[a,1]"),
    case("where.self", "b[a,b] i[b] f[a,1]"),
    case("where.self", "b[b] f[] i[a,1]"),
    case("where.ScalarOther", "b[a,b] i[b]", 2.5),
    case("where.ScalarOther", "b[a,b] f[b]", float("-inf")),
    case("where.ScalarSelf", "b[a,b] i[b]", lambda op, c, y: op(c, 2.5, y)),
    case("where.Scalar", "b[a,b]", 1, 0),
    case("where.Scalar", "b[a,b]", 0.5, 0),
    case("masked_fill.Scalar", "f[a,b] b[b]", float("-inf")),
    case("masked_fill.Scalar", "i[a,b] b[a,1]", 3),
    case("masked_fill.Scalar", "f[b] b[a,b]", 1),
    case("masked_fill.Scalar", "b[a,b] b[b]", False),
    case("masked_fill.Scalar", "h[a,b] b[b]", torch.finfo(torch.float16).min),
    case("masked_fill.Tensor", "h[a,b] b[b] f[]"),
]
ACTIVATIONS: list[list[Case]] = [
    case("silu.default gelu.default softplus.default leaky_relu.default elu.default hardtanh.default", "f[a,b]"),
    case("relu6.default hardsigmoid.default hardswish.default mish.default", "f[a,0,b]"),
    case("gelu.default", "f[a,b]", approximate="tanh"),
    case("softplus.default", "f[a,b]", 3, 4),
    case("leaky_relu.default", "f[a,b]", 0.2),
    case("elu.default", "f[a,b]", 0.7),
    case("hardtanh.default", "i[a,b]", -2, 2),
    case("hardsigmoid.default relu6.default hardswish.default", "", lambda op, *_: op(torch.linspace(-8, 8, 33))),
    case("dropout.default feature_dropout.default", "f[a,b]", 0.5, False),
    case("dropout.default", "f[a,b]", 0.0, True),
]
TYPES: list[list[Case]] = [
    case("to.dtype _to_copy.default", "f[a,b]", lambda op, x: op(x, dtype=torch.int64)),
    case("to.dtype _to_copy.default", "w[a,b]", lambda op, x: op(x, dtype=torch.bool)),
    case("to.dtype", "i[a,b]", torch.float16),
    case("to.dtype", "f[a,b]", torch.float32),
    case("to.dtype", "b[a]", torch.int32),
    case("to.dtype", "i[a,b]", torch.uint8),
    case("to.dtype_layout", "f[a,b]", dtype=torch.float64, layout=torch.strided, device=torch.device("cpu")),
    case("to.device", "f[a,b]", torch.device("cpu"), torch.float64),
    case("to.other type_as.default", "f[a,b] i[b]"),
    case(
        "alias.default clone.default contiguous.default detach.default lift_fresh_copy.default positive.default",
        "f[a,b]",
    ),
    case("detach_.default", "f[a,b]"),
]
CREATION: list[list[Case]] = [
    case("full.default", "f[a,b]", lambda op, x: op([x.shape[0], 2], 1.5)),
    case("full.default", "f[a,b]", lambda op, x: op([x.shape[0]], 3)),
    case("full.default", "f[a,b]", lambda op, x: op([], True)),
    case("full.default", "f[a,b]", lambda op, x: op([2, x.shape[1]], x.shape[0], dtype=torch.float32)),
    case("full.default", "f[a,b]", lambda op, x: op([0, x.shape[1]], 2, dtype=torch.int32)),
    case("full_like.default", "i[a,b]", 3),
    case("full_like.default", "i[a,b]", 1.5, dtype=torch.float32),
    case("fill.Scalar", "i[a,b]", 2.5),
    case("fill.Scalar", "f[a,b]", lambda op, x: op(x, x.shape[0])),
    case("fill.Tensor", "f[a,b] i[]"),
    case("zero.default", "i[a,b]"),
    case("new_full.default", "h[a,b]", lambda op, x: op(x, [x.shape[1], 2], float("inf"))),
    case("zeros.default ones.default", "f[a,b]", lambda op, x: op([x.shape[0], 2], dtype=torch.bool)),
    case("zeros.default ones.default", "f[a,b]", lambda op, x: op([x.shape[0]])),
    case("zeros_like.default ones_like.default", "i[a,b]"),
    case("zeros_like.default ones_like.default", "i[a,b]", dtype=torch.float64),
    case("new_zeros.default new_ones.default", "i[a,b]", lambda op, x: op(x, [x.shape[1], 2])),
    case("empty.memory_format", "f[a,b]", lambda op, x: torch.ones_like(op([x.shape[0], 2]))),
    case("empty_like.default", "i[a,b]", lambda op, x: torch.ones_like(op(x))),
    case("new_empty.default", "i[a,b]", lambda op, x: torch.ones_like(op(x, [x.shape[0], 2]))),
    case("scalar_tensor.default", "f[a]", lambda op, x: op(1.5)),
    case("scalar_tensor.default", "f[a]", lambda op, x: op(x.shape[0], dtype=torch.int64)),
    case("arange.default", "f[a,b]", lambda op, x: op(x.shape[1])),
    case("arange.default", "f[a,b]", lambda op, x: op(x.shape[1], dtype=torch.float32)),
    case("arange.default", "f[a]", lambda op, x: op(3.5)),
    case("arange.start", "f[a,b]", lambda op, x: op(x.shape[0], x.shape[0] + x.shape[1])),
    case("arange.start", "f[a,b]", lambda op, x: op(-0.5, 3)),
    case("arange.start_step", "f[a,b]", lambda op, x: op(0, 2 * x.shape[1], 2)),
    case("arange.start_step", "f[a,b]", lambda op, x: op(x.shape[1], -1, -1)),
    case("arange.start_step", "f[a,b]", lambda op, x: op(1, 0, -0.3)),
    case("arange.start_step", "f[a,b]", lambda op, x: op(0, 7, 2, dtype=torch.float32)),
]
INDEXING: list[list[Case]] = [
    case("embedding.default", "f[7,b] n[a,c]"),
    case("embedding.default", "f[7,b] n[]"),
    case("index_select.default", "f[a,2,b]", lambda op, x: op(x, -2, torch.tensor([1, 0, 1]))),
    case("index_select.default", "f[2,b] n[a]", lambda op, x, i: op(x, 0, i.int())),
    case("gather.default", "f[a,2,b] n[a,c,b]", lambda op, x, i: op(x, 1, i)),
    case("gather.default", "f[a,2] n[a,c]", lambda op, x, i: op(x, -1, i)),
    case("take_along_dim.default", "f[3,2] n[1,c]", lambda op, x, i: op(x, i, 1)),
    case("take_along_dim.default", "f[1,2] n[3,c]", lambda op, x, i: op(x, i, -1)),
    case("take_along_dim.default", "f[2,2,3] n[2,c,3]", lambda op, x, i: op(x, i, 1)),
    case("take_along_dim.default", "f[a,2] n[3]", lambda op, x, i: op(x, i)),
    case("index.Tensor", "f[2,b] n[a,c]", lambda op, x, i: op(x, [i])),
    case("index.Tensor", "f[2,b] m[a]", lambda op, x, i: op(x, [i])),
    case("index.Tensor", "f[a,2,b] n[c]", lambda op, x, i: op(x, [None, i])),
    case("index.Tensor", "f[2,b,2] n[a] m[a]", lambda op, x, i, j: op(x, [i, None, j])),
    case("index.Tensor", "f[2,2,b] n[a,1] m[c]", lambda op, x, i, j: op(x, [i, j])),
    case("index.Tensor", "f[a,2,2,b] m[c] n[2,1]", lambda op, x, i, j: op(x, [None, i, j])),
    case("index.Tensor", "f[a,b] b[a]", lambda op, x, i: op(x, [i]).sum(0)),
    case("index_put.default", "f[2,b] n[a] f[]", lambda op, x, i, v: op(x, [i], v)),
    case("index_put.default", "f[2,b] f[2,b]", lambda op, x, v: op(x, [torch.tensor([1, -2])], v)),
    case("index_put.default", "f[2,b] n[a] f[a,b]", lambda op, x, i, v: op(x, [i], v, True)),
    case("index_put.default", "f[2,2,b] n[a] n[a] f[b]", lambda op, x, i, j, v: op(x, [i, j], v, True)),
    case("index_put.default", "f[a,2] f[]", lambda op, x, v: op(x, [None, torch.tensor([1])], v)),
    case("index_put.default", "f[a,b] b[a,b] f[]", lambda op, x, i, v: op(x, [i], v)),
    case("index_put.default", "f[a,b] b[a] f[]", lambda op, x, i, v: op(x, [i], v)),
    case("scatter.src", "f[a,2,b] f[a,2,b]", lambda op, x, s: op(x, 1, torch.tensor([[[1], [0]]]).expand_as(x), s)),
    case("scatter.src", "f[4,b] f[6,b]", lambda op, x, s: op(x, -2, torch.tensor([[2], [1]]).expand(2, x.shape[1]), s)),
    case("scatter.value", "f[a,2] n[a,c]", lambda op, x, i: op(x, 1, i, 2.5)),
    case("scatter.value", "i[a,2] n[a,c]", lambda op, x, i: op(x, -1, i, 1)),
    case("scatter_add.default", "f[a,2] n[a,c] f[a,c]", lambda op, x, i, s: op(x, 1, i, s)),
    case("scatter_add.default", "i[2,b] n[a,b] i[a,b]", lambda op, x, i, s: op(x, 0, i, s)),
    case("scatter_reduce.two", "f[2,b] n[a,b] f[a,b]", lambda op, x, i, s: op(x, 0, i, s, "amax")),
    case("scatter_reduce.two", "f[a,2] n[a,c] f[a,c]", lambda op, x, i, s: op(x, -1, i, s, "prod")),
    case("index_add.default", "f[2,b] n[a] f[a,b]", lambda op, x, i, s: op(x, 0, i, s)),
    case("index_add.default", "f[2] n[a] f[a]", lambda op, x, i, s: op(x, 0, i, s)),
    case("index_add.default", "f[b,2] n[a] f[b,a]", lambda op, x, i, s: op(x, -1, i, s, alpha=2)),
    case("nonzero.default", "b[a,b]", lambda op, x: op(x).sum(0)),
    case("nonzero.default", "i[a,b]", lambda op, x: op(x).sum(0)),
    case("one_hot.default", "n[a,b]", 3),
]
PRODUCTS: list[list[Case]] = [
    case("linear.default", "f[a,b,7] f[5,7] f[5]"),
    case("linear.default", "f[a,b] f[c,b]"),
    case("linear.default", "f[b] f[c,b]"),
    case("linear.default", "f[a,b] f[b]"),
    case("matmul.default", "f[a,b] f[b,c]"),
    case("matmul.default", "f[2,a,b] f[b]"),
    case("matmul.default", "f[b] f[2,b,c]"),
    case("matmul.default", "f[2,1,a,b] f[3,b,c]"),
    case("matmul.default", "i[a,b] i[b,c]"),
    case("mm.default", "f[a,b] f[b,c]"),
    case("bmm.default", "f[2,a,b] f[2,b,c]"),
    case("mv.default", "f[a,b] f[b]"),
    case("dot.default", "f[b] f[b]"),
    case("addmm.default", "f[c] f[a,b] f[b,c]"),
    case("addmm.default", "f[a,c] f[a,b] f[b,c]", beta=0.5, alpha=2),
    case("addmm.default", "f[c] f[a,b] f[b,c]", beta=0),
    case("baddbmm.default", "f[2,a,c] f[2,a,b] f[2,b,c]", beta=2),
    case("einsum.default", "f[a,b] f[b,c]", lambda op, x, y: op("ij,jk->ki", [x, y])),
    case("einsum.default", "f[2,a,b] f[2,c,b]", lambda op, x, y: op("...ij, ...kj -> ...ik", [x, y])),
    case("conv1d.default", "f[a,4,b] f[6,4,2] f[6]"),
    case("conv1d.default", "f[a,4,9] f[6,2,3]", lambda op, x, w: op(x, w, None, [2], [1], [2], 2)),
    case("conv2d.default", "f[a,2,8,9] f[4,2,3,2] f[4]", [2, 1], [1, 0]),
    case("conv3d.default", "f[a,2,5,6,7] f[4,2,3,2,1]"),
    case("rms_norm.default", "f[a,b,6] f[6]", lambda op, x, w: op(x, [6], w, 1e-5)),
    case("rms_norm.default", "f[a,b,6]", lambda op, x: op(x, [6])),
    case("rms_norm.default", "f[a,5,6]", lambda op, x: op(x, [5, 6], eps=1e-3)),
    case("layer_norm.default", "f[a,b,6] f[6] f[6]", lambda op, x, w, b: op(x, [6], w, b, 1e-3)),
    case("layer_norm.default", "f[a,5,6]", lambda op, x: op(x, [5, 6])),
    case("layer_norm.default", "f[a,6] f[6]", lambda op, x, b: op(x, [6], None, b)),
    case("native_layer_norm.default", "f[a,b,6] f[6] f[6]", lambda op, x, w, b: op(x, [6], w, b, 1e-3)),
    case("group_norm.default", "f[a,6,b] f[6] f[6]", lambda op, x, w, b: op(x, 3, w, b, 1e-3)),
    case("group_norm.default", "f[a,6,b]", lambda op, x: op(x, 2)),
    case("batch_norm.default", "f[a,6,b,2] f[6] f[6] f[6] p[6]", False, 0.1, 1e-3, False),
    case(
        "batch_norm.default", "f[a,6] f[6] p[6]", lambda op, x, m, v: op(x, None, None, m, v, False, 0.1, 1e-3, False)
    ),
]
ATTENTION: list[list[Case]] = [
    case("scaled_dot_product_attention.default", "f[2,4,a,8] f[2,4,b,8] f[2,4,b,6]"),
    case("scaled_dot_product_attention.default", "f[2,4,a,8] f[2,4,b,8] f[2,4,b,8] b[2,1,a,b]", scale=0.3),
    case("scaled_dot_product_attention.default", "f[2,4,a,8] f[2,4,b,8] f[2,4,b,8] f[a,b]"),
    case("scaled_dot_product_attention.default", "f[2,4,a,8] f[2,4,b,8] f[2,4,b,8]", is_causal=True),
    case("scaled_dot_product_attention.default", "f[2,4,a,8] f[2,2,b,8] f[2,2,b,8]", enable_gqa=True),
    case("scaled_dot_product_attention.default", "f[2,a,8] f[2,b,8] f[2,b,8] b[2,a,b]"),
    case("scaled_dot_product_attention.default", "f[2,a,8] f[2,b,8] f[2,b,8] f[a,b]"),
    case(
        "_scaled_dot_product_flash_attention_for_cpu.default", "f[2,4,a,8] f[2,4,b,8] f[2,4,b,8] f[2,1,a,b]",
        lambda op, q, k, v, m: op(q, k, v, attn_mask=m)[0],
    ),
]  # fmt: skip
REDUCTIONS: list[list[Case]] = [
    case("sum.default mean.default prod.default amax.default amin.default max.default min.default", "f[a,b,2]"),
    case("sum.default prod.default max.default min.default", "i[a,b]"),
    case("sum.default prod.default", "b[a,b]"),
    case("sum.default mean.default prod.default max.default", "f[]"),
    case("sum.default prod.default any.default all.default", "i[0,b]"),
    case("sum.default mean.default", "i[a,b]", dtype=torch.float32),
    case("sum.dim_IntList mean.dim", "f[a,b,2]", [-1, 0]),
    case("sum.dim_IntList mean.dim", "f[a,b,2]", [1], True),
    case("sum.dim_IntList mean.dim", "f[a,b]", None, True),
    case("sum.dim_IntList mean.dim", "f[a,b]", []),
    case("sum.dim_IntList", "b[a,b]", [0]),
    case("sum.dim_IntList", "j[a,b]", [-1]),
    case("sum.dim_IntList mean.dim", "i[a,b]", [-1], dtype=torch.float64),
    case("sum.dim_IntList", "f[]", [0]),
    case("prod.dim_int", "f[a,b]", -1, True),
    case("prod.dim_int", "j[a,b]", 0),
    case("logsumexp.default", "f[a,b]", [-1]),
    case("logsumexp.default", "f[a,b,2]", [0, 1], True),
    case("linalg_vector_norm.default", "f[a,b]"),
    case("linalg_vector_norm.default", "f[a,b]", 1, [-1], True),
    case("linalg_vector_norm.default", "f[a,b]", 2, [0], dtype=torch.float64),
    case("linalg_vector_norm.default", "f[a,b]", float("inf"), [-1]),
    case("var.correction", "f[a,5]", [-1]),
    case("var.correction", "f[a,b]", [-1], correction=0, keepdim=True),
    case("var.correction", "f[4,5]", correction=2),
    case("var.correction", "f[a,b]", [-1]),
    case("amax.default amin.default", "f[a,b,2]", [0, -1], True),
    case("amax.default amin.default", "i[a,b]", [1]),
    case("amax.default amin.default", "b[a,b]", [1]),
    case("max.dim min.dim", "f[a,b]", -1),
    case("max.dim min.dim", "f[a,b]", 0, True),
    case("max.dim min.dim", "i[a,b]", 1),
    case("argmax.default argmin.default", "f[a,b]"),
    case("argmax.default argmin.default", "f[a,b]", None, True),
    case("argmax.default argmin.default", "i[a,b]", -1),
    case("argmax.default argmin.default", "f[a,b]", 0, True),
    case("any.default all.default", "b[a,b]"),
    case("any.default all.default", "w[a,b]"),
    case("any.default all.default", "i[]"),
    case("any.dim all.dim", "i[a,b]", -1),
    case("any.dim all.dim", "b[a,b]", 0, True),
    case("any.dims all.dims", "b[a,b,2]", [0, -1]),
    case("any.dims all.dims", "b[a,b]", None, True),
    case("cumsum.default", "f[a,b]", -1),
    case("cumsum.default", "j[a,b]", 0),
    case("cumsum.default", "b[a,b]", 1),
    case("cumsum.default", "i[a,b]", 1, dtype=torch.float32),
    case("cumsum.default", "f[]", 0),
    case("softmax.int log_softmax.int", "f[a,b]", -1),
    case("softmax.int log_softmax.int", "h[a,b]", 0, torch.float32),
    case("_softmax.default _log_softmax.default", "f[a,b]", 1, False),
    case("topk.default", "f[a,6]", 3),
    case("topk.default", "f[6,b]", 2, 0, False),
    case("sort.default argsort.default", "f[a,b]"),
    case("sort.default argsort.default", "f[a,b]", 0, True),
    case("sort.stable", "i[a,b]", stable=True, dim=-1, descending=True),
    case("sort.stable", "i[a,b]", stable=True, dim=0),
]
SHAPES: list[list[Case]] = [
    case("view.default reshape.default _unsafe_view.default", "f[a,b,6]", lambda op, x: op(x, [x.shape[0], -1, 3])),
    case("view.default reshape.default", "f[a,b,6]", lambda op, x: op(x, [-1])),
    case("view.default reshape.default", "f[0,b]", lambda op, x: op(x, [x.shape[1], 0, 2])),
    case("view.default", "f[1]", []),
    case("flatten.using_ints", "f[a,b,6]"),
    case("flatten.using_ints", "f[a,b,6]", 1, -1),
    case("flatten.using_ints", "f[]"),
    case("unflatten.int", "f[a,6]", -1, [2, -1]),
    case("unflatten.int", "f[a,6]", 1, [3, 2]),
    case("view_as.default reshape_as.default", "f[a,6] i[a,2,3]"),
    case("unsqueeze.default", "f[a,b]", 1),
    case("unsqueeze.default", "f[a,b]", -1),
    case("unsqueeze.default", "f[]", -1),
    case("squeeze.default", "f[1,2,1]"),
    case("squeeze.dim", "f[a,1,b]", 1),
    case("squeeze.dim", "f[2,1,b]", 0),
    case("squeeze.dims", "f[a,1,b,1]", [-1, 1]),
    case("transpose.int swapaxes.default", "f[a,b,2]", 0, -1),
    case("transpose.int", "f[]", 0, -1),
    case("permute.default", "f[a,b,2]", [-1, 0, 1]),
    case("t.default", "f[a,b]"),
    case("t.default", "f[a]"),
    case("numpy_T.default", "f[a,b]"),
    case("movedim.int", "f[a,b,2]", 0, -1),
    case("movedim.int", "f[a,b,2]", -1, 1),
    case("expand.default", "f[a,1,2]", lambda op, x: op(x, [4, -1, 3, -1])),
    case("expand.default", "f[a,1] i[b]", lambda op, x, y: op(x, [x.shape[0], y.shape[0]])),
    case("expand_as.default", "f[a,1] i[a,b]"),
    case("broadcast_to.default", "f[a,1]", lambda op, x: op(x, [2, x.shape[0], 3])),
    case("copy.default", "f[a,b] i[b]"),
    case("copy.default", "i[a,b] f[a,b]"),
    case("cat.default concat.default", "f[a,b] f[a,c]", lambda op, *xs: op(xs, -1)),
    case("cat.default", "f[a,b] i[c,b]", lambda op, *xs: op(xs)),
    case("cat.default", "f[0] f[a,b] f[a,0]", lambda op, *xs: op(xs, 1)),
    case("cat.default", "f[a,b]", lambda op, x: op([x], 1)),
    case("cat.default", "b[a] i[b]", lambda op, *xs: op(xs)),
    case("stack.default", "f[a,b] f[a,b]", lambda op, *xs: op(xs, -1)),
    case("stack.default", "f[a,b] i[a,b]", lambda op, *xs: op(xs)),
    case("split.Tensor", "f[a,6]", 2, -1),
    case("split.Tensor", "f[7,b]", 3),
    case("split_with_sizes.default split.sizes", "f[a,6]", [1, 2, 3], 1),
    case("chunk.default", "f[a,6]", 2, -1),
    case("chunk.default", "f[5,b]", 2),
    case("chunk.default", "f[a,1]", 2, 1),
    case("unbind.int", "f[3,b]"),
    case("unbind.int", "f[a,1]", -1),
    case("select.int", "f[a,b]", 0, 1 - 1),
    case("select.int", "f[a,b]", -1, -2),
    case("select.int", "f[a,b]", lambda op, x: op(x, 1, x.shape[1] - 2)),
    case("slice.Tensor", "f[a,b]"),
    case("slice.Tensor", "f[a,b]", 1, 1, 4),
    case("slice.Tensor", "f[a,b]", -1, -2, None),
    case("slice.Tensor", "f[a,9]", 1, None, -1, 3),
    case("slice.Tensor", "f[a,b]", lambda op, x: op(x, 1, x.shape[1] - 2)),
    case("narrow.default", "f[a,9]", 1, 2, 3),
    case("narrow.default", "f[a,9]", 1, -4, 2),
    case("narrow.default", "f[a,b]", lambda op, x: op(x, 1, x.shape[1] - 2, 2)),
    case("slice_scatter.default", "f[a,9] f[a,2]", 1, 3, 5),
    case("slice_scatter.default", "f[a,9] f[a,2]", -1, -2),
    case("slice_scatter.default", "f[a,9] f[a,9]", 1),
    case("slice_scatter.default", "f[a,9] f[a,3]", 1, 0, None, 3),
    case("select_scatter.default", "f[a,b] f[b]", 0, 0),
    case("select_scatter.default", "f[a,b] f[a]", -1, -1),
    case("repeat.default tile.default", "f[a,b]", [2, 1, 3]),
    case("repeat.default tile.default", "f[a,b]", [1, 1]),
    case("tile.default", "f[a,b,2]", [2]),
    case("repeat.default", "f[a,b]", lambda op, x: op(x, [x.shape[1], 1])),
    case("repeat_interleave.self_int", "f[a,b]", 2, -1),
    case("repeat_interleave.self_int", "f[a,b]", 3),
    case("repeat_interleave.self_int", "f[a,b]", 1, 0),
    case("repeat_interleave.self_int", "f[a,b]", 1),
    case("flip.default", "f[a,b]", [0, -1]),
    case("flip.default", "f[a,b]", []),
    case("roll.default", "f[a,5]", [2], [1]),
    case("roll.default", "f[4,5]", [1, -1], [0, 1]),
    case("roll.default", "f[a,b]", [1], [-1]),
    case("roll.default", "f[a,b]", [1]),
    case("tril.default triu.default", "f[a,b]"),
    case("tril.default triu.default", "i[2,a,b]", -1),
    case("tril.default triu.default", "b[a,b]", 1),
    case("triu.default", "f[a,b]", lambda op, x: op(x, x.shape[0] - 2)),
    case("constant_pad_nd.default", "f[a,b]", [1, 2]),
    case("constant_pad_nd.default", "i[a,b]", [1, 2, 0, 3], 7),
    case("constant_pad_nd.default", "f[a,9]", [-1, 2, 0, 0], 0.5),
    case("constant_pad_nd.default", "b[a,b]", [1, 0], True),
    case("constant_pad_nd.default", "f[a,b]", lambda op, x: op(x, [0, x.shape[0]])),
    case("pad.default", "f[a,b]", [1, 2]),
    case("pad.default", "f[2,a,5]", [1, 2], "reflect"),
    case("pad.default", "f[2,a,5]", [1, 2], "replicate"),
    case("pad.default", "f[2,a,5]", [1, 2], "circular"),
]  # fmt: skip
CASES: list[Case] = [
    one
    for group in (
        ARITHMETIC, LOGIC, ACTIVATIONS, TYPES, CREATION, INDEXING, PRODUCTS, ATTENTION, REDUCTIONS, SHAPES,
    )
    for cases in group
    for one in cases
]  # fmt: skip


class Calling(nn.Module):
    """A module of one operator."""

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        super().__init__()
        packet, overload = name.split(".")
        self.operator, self.call = getattr(getattr(torch.ops.aten, packet), overload), call

    def forward(self, *tensors: Tensor) -> Any:
        return self.call(self.operator, *tensors)


def flat(results: Any) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@pytest.mark.parametrize(("name", "tensors", "call"), CASES, ids=[f"{name}-{text}" for name, text, _ in CASES])
def test_row(name: str, tensors: str, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, row, reached = Calling(name, call), ROWS[f"aten.{name}"], []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        reached.append(name)
        return row(*args, **kwargs)

    monkeypatch.setitem(ROWS, f"aten.{name}", recorded)
    graph = import_program(export_module(module, tuple(drawn(tensors, EXAMPLE)), {}))
    assert reached, "the program does not have the operator"
    graph.validate()
    stated = [(value.dtype, value.shape) for value in graph.outputs]
    executors = {"imported": Executor(graph)}
    canonicalize(graph)
    executors["canonical"] = Executor(graph)
    assert [value.dtype for value in graph.outputs] == [dtype for dtype, _ in stated]
    for sizes in (EXAMPLE, *OTHERS) if any(letter in tensors for letter in ("a", "b,", "b]", "c")) else (EXAMPLE,):
        given = drawn(tensors, sizes)
        wanted = flat(module(*given))
        for form, executor in executors.items():
            got = executor(*given)
            assert len(got) == len(wanted)
            for result, expected in zip(got, wanted, strict=True):
                assert error_of(result, expected) == "", f"{form}, {sizes}"


def test_every_row_has_a_case() -> None:
    own = {name for name in ROWS if name.startswith("fuser.")}  # of quantized modules: tests/test_quantized.py
    assert {f"aten.{name}" for name, _, _ in CASES} == set(ROWS) - own
