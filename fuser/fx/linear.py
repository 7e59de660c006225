"""Matrix products, linears, convolutions and norms."""

from collections.abc import Sequence
from typing import Any

import torch

from fuser.constants import Transposed
from fuser.errors import UnsupportedOperator
from fuser.formats import format_of
from fuser.fx.table import At, Number, aten, dtype_of, rank
from fuser.graph import FUSER, Value
from fuser.quantized import DoubledScales, Quantized
from fuser.tensors import Held


@aten("linear.default")
def linear(at: At, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """A weight [out, in] is a constant seen transposed; it is not copied."""
    if rank(weight) == 1:
        product = at.op("MatMul", x, weight)
    elif isinstance(weight.constant, (Held, Quantized)):
        product = at.op("MatMul", x, at.held(Transposed(weight.constant), weight.name))
    else:
        product = at.op("MatMul", x, at.op("Transpose", weight, perm=(1, 0)))
    return product if bias is None else at.op("Add", product, bias)


@aten("dequantize.default", namespace="fuser")
def dequantize(
    at: At, codes: Value, scales: Value, zeros: Value | None, seconds: Value | None, format: str, width: int,
    dtype: torch.dtype,
) -> Value:  # fmt: skip
    """The codes of a quantized linear are a constant; nothing is dequantized."""
    given = (codes, scales, zeros, seconds)
    if any(value is not None and value.constant is None for value in given):
        raise UnsupportedOperator("codes that are no parameters or buffers of the module")
    held = [None if value is None else value.constant for value in given]
    assert held[0] is not None and held[1] is not None
    steps = held[1] if held[3] is None else DoubledScales(held[1], held[3])
    constant = Quantized(held[0], steps, held[2], format_of(format), width, dtype_of(dtype))
    return at.held(constant, codes.name)


@aten("fake_quantize.default", namespace="fuser")
def fake_quantize(at: At, x: Value, kind: str) -> Value:
    return at.op("fake_quantize", x, domain=FUSER, kind=kind)


@aten("matmul.default", "mm.default", "bmm.default", "mv.default", "dot.default")
def matmul(at: At, a: Value, b: Value) -> Value:
    return at.op("MatMul", a, b)


@aten("addmm.default", "baddbmm.default")
def addmm(at: At, bias: Value, a: Value, b: Value, beta: Number = 1, alpha: Number = 1) -> Value:
    product = at.op("MatMul", a, b)
    if alpha != 1:
        product = at.op("Mul", product, at.scalar(alpha, at.dtype))
    if beta == 0:
        return product
    return at.op("Add", product, bias if beta == 1 else at.op("Mul", bias, at.scalar(beta, at.dtype)))


@aten("einsum.default")
def einsum(at: At, equation: str, tensors: Sequence[Value], path: Any = None) -> Value:
    return at.op("Einsum", *tensors, equation=equation)


@aten("conv1d.default", "conv2d.default", "conv3d.default")
def convolution(
    at: At, x: Value, weight: Value, bias: Value | None = None, stride: Sequence[int] = (), padding: Sequence[int] = (),
    dilation: Sequence[int] = (), groups: int = 1,
) -> Value:  # fmt: skip
    spatial = rank(weight) - 2
    if rank(x) != rank(weight):
        raise UnsupportedOperator("a convolution without a batch")

    def every(given: Sequence[int], default: int) -> tuple[int, ...]:
        numbers = tuple(given) or (default,)
        return numbers * spatial if len(numbers) == 1 else numbers

    return at.op(
        "Conv", x, weight, bias, strides=every(stride, 1), pads=every(padding, 0) * 2, dilations=every(dilation, 1),
        group=groups,
    )  # fmt: skip


@aten("rms_norm.default")
def rms_norm(
    at: At, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    assert x.dtype is not None
    gain = weight if weight is not None else at.filled(1, x.dtype, tuple(normalized_shape))
    epsilon = torch.finfo(x.dtype.torch).eps if eps is None else float(eps)
    y = at.op("RMSNormalization", x, gain, axis=-len(normalized_shape), epsilon=epsilon)
    return y if gain.dtype is at.dtype else at.op("Cast", y, to=at.dtype.onnx)


@aten("layer_norm.default")
def layer_norm(
    at: At, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    return _layer_norm(at, x, normalized_shape, weight, bias, eps, 1)[0]


@aten("native_layer_norm.default")
def native_layer_norm(
    at: At, x: Value, normalized_shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> Sequence[Value]:
    return _layer_norm(at, x, normalized_shape, weight, bias, eps, 3)


def _layer_norm(
    at: At, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float, outputs: int
) -> list[Value]:
    assert x.dtype is not None
    gain = weight if weight is not None else at.filled(1, x.dtype, tuple(shape))
    return at.ops("LayerNormalization", outputs, x, gain, bias, axis=-len(shape), epsilon=float(eps))


@aten("batch_norm.default")
def batch_norm(
    at: At, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, variance: Value | None,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Value:  # fmt: skip
    """By the statistics that were kept: a scale and a shift of each channel."""
    if training or mean is None or variance is None:
        raise UnsupportedOperator("batch_norm by the statistics of the batch; call module.eval() first")
    by = at.op("Rsqrt", at.op("Add", variance, at.scalar(eps, at.dtype)), domain=FUSER)
    by = by if weight is None else at.op("Mul", by, weight)
    shift = at.op("Neg", at.op("Mul", mean, by))
    shift = shift if bias is None else at.op("Add", shift, bias)
    inner = tuple(range(1, rank(x) - 1))
    columns = [at.op("Unsqueeze", part, axes=inner) if inner else part for part in (by, shift)]
    return at.op("Add", at.op("Mul", x, columns[0]), columns[1])


@aten("group_norm.default")
def group_norm(
    at: At, x: Value, num_groups: int, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    assert x.shape is not None and x.dtype is not None
    gain = weight if weight is not None else at.full(1, x.dtype, x.shape[1:2])
    shift = bias if bias is not None else at.full(0, x.dtype, x.shape[1:2])
    return at.op("GroupNormalization", x, gain, shift, num_groups=num_groups, epsilon=float(eps))
