"""Products with quantized weights, as a target runs them: by their codes where it can, else with the weight made anew."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from fuser.constants import Constant, Transposed
from fuser.dtypes import DType
from fuser.graph import FUSER, Graph, Value
from fuser.onnx_weights import ByRows, Flat, bnb, codes_of, holds_codes, linear, nbits, nbits_block, pieces, stacked
from fuser.quantized import Quantized

Say = Callable[[str], None]


def product(op: Any, x: Value, weight: Value, target: str) -> Value:
    """x [.., K] @ weight [K, N] whose constant holds codes, part by part where the parts' formats differ."""
    assert weight.constant is not None
    parts = pieces(weight.constant) if target == "ort" else []
    ways = [_by_codes(part, x) if isinstance(part, Quantized) else None for part in parts]
    if not any(ways):
        whole: Value = op.plain("MatMul", x, weight)
        return whole
    found = []
    for part, by_codes in zip(parts, ways, strict=True):
        if by_codes is not None and isinstance(part, Quantized):
            found.append(by_codes(op, x, part, weight.name))
        else:
            rest = Transposed(part) if isinstance(part, Quantized) else part
            found.append(op.plain("MatMul", x, op.held(rest, weight.name)))
    result: Value = found[0] if len(found) == 1 else op.Concat(*found, axis=-1)
    return result


def _by_codes(weight: Quantized, x: Value) -> Callable[[Any, Value, Quantized, str], Value] | None:
    """How ONNX Runtime computes with the codes themselves; None where it does not."""
    if x.dtype is DType.FLOAT64:
        return None
    if weight.format.kind == "nf4":
        return _bnb
    if weight.format.activations is None:
        return None if nbits_block(weight) is None else _nbits
    rounded = x.producer is not None and x.producer.is_a("fake_quantize", FUSER)
    return _integers if rounded and weight.format.kind == "int8" else None


def _widened(op: Any, x: Value, weight: Quantized) -> Value:
    """The input, in float32 where its own type does not hold the scales or ONNX Runtime does not compute in it."""
    if x.dtype is DType.FLOAT16 and _fits(weight.scales, x.dtype):
        return x
    wide: Value = x if x.dtype is DType.FLOAT32 else op.Cast(x, to=op.FLOAT)
    return wide


def _fits(scales: Constant, dtype: DType) -> bool:
    if scales.dtype is dtype:
        return True
    held = scales.numpy().astype(np.float32)
    with np.errstate(over="ignore"):
        return bool((held.astype(dtype.numpy).astype(np.float32) == held).all())


def _nbits(op: Any, x: Value, weight: Quantized, name: str) -> Value:
    block = nbits_block(weight)
    assert block is not None
    given = _widened(op, x, weight)
    assert given.dtype is not None
    parts = nbits(weight, block, given.dtype)
    held = [
        None if part is None else op.held(part, f"{name}_{suffix}")
        for part, suffix in zip(parts, ("codes", "scales", "zeros"), strict=True)
    ]
    N, K = weight.shape
    y = op.microsoft.MatMulNBits(given, *held, K=K, N=N, bits=weight.format.bits, block_size=block)
    result: Value = op.CastLike(y, x)
    return result


def _bnb(op: Any, x: Value, weight: Quantized, name: str) -> Value:
    """Blocks go on from row to row: where a row is no whole number of them, it is given zeros."""
    codes, scales, block, K = bnb(weight)
    given = _widened(op, x, weight)
    assert given.dtype is not None and given.rank is not None
    absmax = ByRows((scales,), given.dtype, scales.shape, lambda rows: rows)
    if missing := K - weight.width:
        pads = op.constant([0] * (2 * given.rank - 1) + [missing], DType.INT64, "pads")
        given = op.Pad(given, pads)
    y = op.microsoft.MatMulBnb4(
        given, op.held(codes, f"{name}_codes"), op.held(absmax, f"{name}_scales"),
        K=K, N=weight.shape[0], block_size=block, quant_type=1,
    )  # fmt: skip
    result: Value = op.CastLike(y, x)
    return result


def _integers(op: Any, x: Value, weight: Quantized, name: str) -> Value:
    """Codes by codes, as integers: unsigned both, which every CPU adds up exactly."""
    assert x.producer is not None
    source = x.producer.inputs[0]
    assert source is not None
    codes, scale = op.once("uint8 codes", lambda e: _rows_as_codes(e, source), after=source)
    middle = op.constant(128, DType.UINT8, "middle")
    total = op.MatMulInteger(codes, op.held(Transposed(codes_of(weight)), f"{name}_codes"), middle, middle)
    scales = ByRows((Flat(weight.scales),), DType.FLOAT32, (weight.shape[0],), lambda rows: rows)
    y = op.Mul(op.Mul(op.Cast(total, to=op.FLOAT), scale), op.held(scales, f"{name}_scales"))
    result: Value = op.CastLike(y, x)
    return result


def _rows_as_codes(op: Any, x: Value) -> tuple[Value, Value]:
    """Each row of x by a scale of its own, max|x| / 127: codes uint8, the middle at 128, and scales [.., 1] float32."""
    wide = x if x.dtype is DType.FLOAT32 else op.Cast(x, to=op.FLOAT)
    most = op.ReduceMax(op.Abs(wide), axes=(-1,), keepdims=1)
    one = op.Constant(value_float=1.0)
    scale = op.Where(op.Greater(most, op.Constant(value_float=0.0)), op.Div(most, op.Constant(value_float=127.0)), one)
    codes = op.Cast(op.Add(op.Round(op.Div(wide, scale)), op.Constant(value_float=128.0)), to=DType.UINT8.onnx)
    return codes, scale


def tell_of_scales(graph: Graph, target: str, say: Say) -> None:
    """Says which weights lose the eight bits of their scales: `ort` has codes for them, and scales in floating point."""
    constants = [value.constant for value in graph.constants() if value.constant is not None]
    leaves = {id(leaf): leaf for constant in constants for leaf in constant.leaves()}
    counts = Counter(str(leaf.format) for leaf in leaves.values() if isinstance(leaf, Quantized) and leaf.format.double)
    for format, count in counts.items() if target == "ort" else ():
        say(
            f"scales of {count} weight{'s' if count > 1 else ''} in {format} written as numbers: the target has none of 8 bits"
        )


def opset_of(graph: Graph, target: str) -> int:
    """The opset that quantized weights would like; 0 where they do not mind."""
    found = 0
    for value in graph.constants():
        for part in pieces(value.constant) if value.constant is not None and holds_codes(value.constant) else ():
            if isinstance(part, Quantized) and part.format.kind != "nf4" and _is_written(part, target):
                found = max(found, _opset(part))
    return found


def _is_written(weight: Quantized, target: str) -> bool:
    """Whether a target has it as DequantizeLinear reads it."""
    return target != "ort" or weight.format.kind == "fp8"


def _opset(weight: Quantized) -> int:
    """Of the DequantizeLinear that reads a weight."""
    if weight.format.kind == "int4" or weight.format.groups(weight.width) > 1:
        return 21
    return 19 if weight.format.kind == "fp8" else 13


def dequantized(graph: Graph, emitter: Callable[[Any], Any], say: Say) -> None:
    """What still reads a quantized weight as numbers reads them from DequantizeLinear; where there is none, from the file."""
    plain: dict[str, int] = {}
    for value in graph.constants():
        if value.constant is None or not holds_codes(value.constant):
            continue
        op, made = emitter(value.consumers[0] if value.consumers else None), []
        for part in pieces(value.constant):
            weight = part if isinstance(part, Quantized) else None
            if weight is not None and weight.format.kind != "nf4" and graph.opset >= _opset(weight):
                made.append(_from_codes(op, weight, value.name))
                continue
            if weight is not None:
                plain[str(weight.format)] = plain.get(str(weight.format), 0) + len(stacked(weight.codes))
            made.append(op.held(Transposed(weight) if weight is not None else part, value.name))
        if len(made) == 1 and made[0].constant is not None:
            continue
        graph.replace(value, made[0] if len(made) == 1 else op.Concat(*made, axis=-1))
    for format, count in plain.items():
        say(f"{count} weight{'s' if count > 1 else ''} in {format} written as numbers: the target has no such codes")


def _from_codes(op: Any, weight: Quantized, name: str) -> Value:
    codes, scales, zeros, block = linear(weight)
    held = [op.held(codes, f"{name}_codes"), op.held(scales, f"{name}_scales")]
    held += [] if zeros is None else [op.held(zeros, f"{name}_zeros")]
    wide: Value = op.DequantizeLinear(*held, axis=0 if block else 1, **({"block_size": block} if block else {}))
    if weight.dtype is DType.FLOAT32:
        return wide
    result: Value = op.Cast(wide, to=weight.dtype.onnx)
    return result
