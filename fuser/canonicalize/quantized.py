"""Weights that a file holds as codes become constants that hold the codes, whatever operator reads them."""

from dataclasses import replace

import numpy as np

from fuser.canonicalize.rules import become, emit, rule, sole
from fuser.constants import Array, Constant, Transposed
from fuser.dtypes import DType
from fuser.formats import FP8_MOST, GROUPS, Format
from fuser.graph import FUSER, MICROSOFT, Graph, Node, Value
from fuser.onnx_weights import ByRows, Folded, nibbles, unpacked
from fuser.quantized import Quantized

UNSIGNED = {DType.INT4: 8, DType.INT8: 128, DType.UINT4: 0, DType.UINT8: 0}  # what is added to codes
BITS = {DType.INT4: 4, DType.UINT4: 4, DType.INT8: 8, DType.UINT8: 8}


def _sizes(node: Node) -> tuple[int, int, int]:
    """K, N and the block of a product with codes; of what is not said, one."""
    K, N, block = (node.attributes.get(name) for name in ("K", "N", "block_size"))
    return K or 1, N or 1, block or 1


@rule("MatMulNBits", domain=MICROSOFT)
def _nbits(graph: Graph, node: Node) -> bool:
    """A product with codes is a product with the weight that they stand for."""
    x, held, scales, zeros, order, bias = (node.input(i) for i in range(6))
    K, N, block = _sizes(node)
    bits = node.attributes.get("bits", 4)
    codes, steps = _known(held), _known(scales)
    if codes is None or steps is None or order is not None or bits not in (4, 8) or x is None or x.dtype is None:
        return False
    blocks, levels = -(-K // block), _known(zeros)
    if zeros is not None and (levels is None or levels.dtype is not DType.UINT8):
        return False
    if levels is not None and levels.size != N * -(-blocks * bits // 8):
        return False
    if codes.shape[0] != N or codes.size != N * blocks * block * bits // 8 or steps.size != N * blocks:
        return False
    middles = None if levels is None else unpacked(levels.numpy().reshape(N, -1), bits, blocks)
    width = -(-K * bits // 8)
    packed = ByRows((codes,), DType.UINT8, (N, width), lambda rows: rows.reshape(len(rows), -1)[:, :width])
    kind = "int4" if bits == 4 else "int8"
    weight = _weight(packed, steps.numpy().reshape(N, blocks), middles, kind, block, K, x.dtype)
    return weight is not None and held is not None and _linear(graph, node, x, weight, held.name, bias)


@rule("MatMulBnb4", domain=MICROSOFT)
def _bnb(graph: Graph, node: Node) -> bool:
    """Likewise of NF4, whose rows may have been given zeros up to a whole number of blocks."""
    x, held, scales = node.inputs[:3]
    K, N, block = _sizes(node)
    codes, steps = _known(held), _known(scales)
    if node.attributes.get("quant_type") != 1 or codes is None or steps is None or x is None or x.dtype is None:
        return False
    if K % block or codes.size != N * K // 2 or steps.size != N * K // block:
        return False
    given, width = _unpadded(x, K)
    bytes_ = -(-width // 2)

    def low_first(rows: np.ndarray) -> np.ndarray:
        return (rows << 4 | rows >> 4)[:, :bytes_]

    packed = ByRows((Folded(codes, (N, K // 2)),), DType.UINT8, (N, bytes_), low_first)
    weight = _weight(packed, steps.numpy().reshape(N, -1), None, "nf4", block, width, x.dtype)
    return weight is not None and held is not None and _linear(graph, node, given, weight, held.name, None)


def _unpadded(x: Value, K: int) -> tuple[Value, int]:
    """The rows before zeros were added behind them, and their width."""
    pad = x.producer
    pads = _known(pad.input(1)) if pad is not None and pad.is_a("Pad") else None
    if pad is None or pads is None or pad.input(2) is not None or pad.attributes.get("mode", "constant") != "constant":
        return x, K
    *others, last = pads.numpy().tolist()
    source = pad.inputs[0]
    if any(others) or source is None or not source.shape or source.shape[-1] != K - last or pad.input(3) is not None:
        return x, K
    return source, K - last


@rule("DequantizeLinear")
def _dequantized(graph: Graph, node: Node) -> bool:
    """A weight in codes, [K, N] or, where it is transposed afterwards, [N, K], is a constant."""
    held, scales, zeros = node.input(0), node.input(1), node.input(2)
    codes, steps = _known(held), _known(scales)
    if codes is None or steps is None or held is None or len(codes.shape) != 2 or not node.output.uses:
        return False
    if node.output.pinned or node.attributes.get("output_dtype") or (zeros is not None and _known(zeros) is None):
        return False
    readers = _readers(node.output)
    across = readers == {("MatMul", 1)}
    if not across and readers != {("Transpose", 0)}:
        return False
    block = node.attributes.get("block_size", 0)
    along = node.attributes.get("axis", 1) % 2
    if steps.size > 1 and along != (0 if across else 1) ^ (0 if block else 1):
        return False
    K, N = codes.shape if across else codes.shape[::-1]
    block = block or max(K, 1)
    levels = _known(zeros)
    if any(part is not None and part.size not in (1, N * -(-K // block)) for part in (steps, levels)):
        return False
    middles = None if levels is None else levels.numpy()
    weight = _from_linear(codes, steps.numpy(), middles, across, block, K, N, steps.dtype)
    if weight is None:
        return False
    return become(graph, node, graph.constant(Transposed(weight) if across else weight, held.name))


def _readers(value: Value) -> set[tuple[str, int]]:
    """Who reads a value, or what it is cast to, at which input."""
    found: set[tuple[str, int]] = set()
    for user, index in value.uses:
        found |= (
            _readers(user.output)
            if user.is_a("Cast") and not user.output.pinned
            else {(f"{user.domain}{user.op}", index)}
        )
    return found


def _from_linear(
    codes: Constant,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    across: bool,
    block: int,
    K: int,
    N: int,
    dtype: DType,
) -> Quantized | None:
    """A weight of DequantizeLinear; None where its codes are none of ours."""
    groups = -(-K // block)

    def by_row(array: np.ndarray) -> np.ndarray:
        if array.size == 1:
            return np.full((N, 1), array.reshape(()))
        whole = array.reshape(groups, N).T if across else array.reshape(N, groups)
        return np.ascontiguousarray(whole)

    if codes.dtype is DType.FLOAT8_E4M3FN:
        plain = ByRows((codes,), DType.UINT8, codes.shape, lambda rows: rows.view(np.uint8))
        unpacked_rows = Transposed(plain) if across else plain
        if groups > 1 or (zeros is not None and zeros.astype(np.float32).any()):
            return None
        return _weight(unpacked_rows, by_row(scales), None, "fp8", block, K, dtype)
    if codes.dtype not in UNSIGNED:
        return None
    added, bits = UNSIGNED[codes.dtype], BITS[codes.dtype]
    shifted = ByRows((codes,), DType.UINT8, codes.shape, lambda rows: rows.astype(np.int16) + added)
    rows = Transposed(shifted) if across else shifted
    packed = rows if bits == 8 else ByRows((rows,), DType.UINT8, (N, -(-K // 2)), nibbles)
    levels = by_row(zeros).astype(np.int16) + added if zeros is not None else np.full((N, 1), added)
    levels = np.broadcast_to(levels, (N, groups)).astype(np.uint8)
    steps = np.broadcast_to(by_row(scales), (N, groups))
    return _weight(packed, steps, levels, f"int{bits}", block, K, dtype)


def read_weights(graph: Graph) -> None:
    """Makes constants of the weights that a graph's nodes read as codes, and leaves everything else as it is."""
    rules = {"MatMulNBits": _nbits, "MatMulBnb4": _bnb, "DequantizeLinear": _dequantized}
    for node in list(graph.nodes):
        if node.op in rules and node.domain in ("", MICROSOFT):
            rules[node.op](graph, node)
    graph.sort()


@rule("Cast")
def _another_type(graph: Graph, node: Node) -> bool:
    """A weight in codes is of any type."""
    value = node.inputs[0]
    constant = value.constant if value is not None else None
    base = constant.base if isinstance(constant, Transposed) else constant
    dtype = DType.from_onnx(node.attributes.get("to", 0))
    if value is None or not isinstance(base, Quantized) or not dtype.is_float or not _is_wide(base):
        return False
    cast = Quantized(base.codes, base.scales, base.zeros, base.format, base.width, dtype)
    return become(graph, node, graph.constant(Transposed(cast) if base is not constant else cast, value.name))


def _is_wide(weight: Quantized) -> bool:
    """Whether nothing was rounded yet."""
    return weight.dtype is DType.FLOAT32


@rule("Mul")
def _rounded(graph: Graph, node: Node) -> bool:
    """Rows rounded by scales of their own and brought back are one operator."""
    for value, scale in (node.inputs, node.inputs[::-1]):
        back = _made_by(value, "Cast")
        source, kind = _made_by_input(value, "Round"), "int8"
        if back is not None and back.inputs[0] is not None and back.inputs[0].dtype is DType.FLOAT8_E4M3FN:
            source, kind = _made_by_input(back.inputs[0], "Cast"), "fp8"
        rows = _scaled_rows(source, kind)
        if rows is not None and rows[1] is scale:
            return become(graph, node, emit(graph, node, "fake_quantize", [rows[0]], {"kind": kind}, FUSER))
    return False


@rule("MatMul")
def _by_rounded(graph: Graph, node: Node) -> bool:
    """A weight of eight bits with one scale a row, whose product is with rounded rows, is of that format."""
    x, value = node.inputs
    weight = value.constant.base if value is not None and isinstance(value.constant, Transposed) else None
    maker = x.producer if x is not None else None
    if value is None or not isinstance(weight, Quantized) or maker is None or not maker.is_a("fake_quantize", FUSER):
        return False
    format = Format(weight.format.kind, None, activations=maker.attributes["kind"])
    if replace(weight.format, activations=format.activations) != format or weight.format == format:
        return False
    if format.kind != format.activations:
        return False
    found = Quantized(weight.codes, weight.scales, None, format, weight.width, weight.dtype)
    graph.set_input(node, 1, graph.constant(Transposed(found), value.name))
    return True


@rule("MatMulInteger")
def _integers(graph: Graph, node: Node) -> bool:
    """Rows rounded to eight bits by scales of their own, times codes, times both scales."""
    codes, held, zero, other = (node.input(i) for i in range(4))
    weight = _known(held)
    if codes is None or held is None or weight is None or weight.dtype not in UNSIGNED or len(weight.shape) != 2:
        return False
    added = _made_by(_made_by_input(codes, "Cast"), "Add")
    if added is None or codes.dtype is not DType.UINT8 or not _is(zero, 128.0):
        return False
    rows = _scaled_rows(_made_by_input(_beside(added, 128.0), "Round"), "int8")
    wide = _only_reader(node.output, "Cast")
    if rows is None or wide is None or wide.attributes["to"] != DType.FLOAT32.onnx:
        return False
    source, scale = rows
    by_row = _only_reader(wide.output, "Mul")
    by_channel = None if by_row is None else _only_reader(by_row.output, "Mul")
    if by_row is None or by_channel is None or scale not in by_row.inputs:
        return False
    steps = next((found for value in by_channel.inputs if (found := _known(value)) is not None), None)
    (K, N), shift = weight.shape, UNSIGNED[weight.dtype]
    if steps is None or steps.shape != (N,) or not (_is(other, 128.0 - shift) or (other is None and shift == 128)):
        return False
    unsigned = ByRows((weight,), DType.UINT8, (K, N), lambda rows: rows.astype(np.int16) + shift)
    last, inner = _only_reader(by_channel.output, "Cast"), _made_by_input(source, "Cast")
    if last is not None and inner is not None and inner.dtype is DType.from_onnx(last.attributes["to"]):
        source, by_channel = inner, last  # it is computed in float32 whatever the type of its rows
    dtype = source.dtype or DType.FLOAT32
    found = _weight(Transposed(unsigned), steps.numpy()[:, None], None, "int8", K, K, dtype)
    if found is None:
        return False
    rounded = emit(graph, by_channel, "fake_quantize", [source], {"kind": "int8"}, FUSER)
    return _linear(graph, by_channel, rounded, found, held.name, None)


@rule("Cast")
def _rounded_in_its_type(graph: Graph, node: Node) -> bool:
    """Rows are rounded in float32 and given back in their own type."""
    rounding = _made_by(node.inputs[0], "fake_quantize", FUSER)
    inner = None if rounding is None else _made_by_input(rounding.inputs[0], "Cast")
    if rounding is None or inner is None or inner.dtype is None or inner.dtype.onnx != node.attributes.get("to"):
        return False
    return become(graph, node, emit(graph, node, "fake_quantize", [inner], dict(rounding.attributes), FUSER))


def _scaled_rows(value: Value | None, kind: str) -> tuple[Value, Value] | None:
    """The rows x [.., K] and their scales s [.., 1] behind x / s, where s = max|x| / 127 (fp8: 448), of zeros 1."""
    ratio = _made_by(value, "Div")
    x, scale = ratio.inputs if ratio is not None else (None, None)
    chosen = _made_by(scale, "Where")
    if x is None or scale is None or chosen is None:
        return None
    above, step, one = chosen.inputs
    compared, divided = _made_by(above, "Greater"), _made_by(step, "Div") or _made_by(step, "Mul")
    if compared is None or divided is None or not _is(one, 1.0) or not _is(compared.inputs[1], 0.0):
        return None
    largest = FP8_MOST if kind == "fp8" else 127.0
    by = largest if divided.is_a("Div") else float(np.float32(1) / np.float32(largest))
    most = _made_by(divided.inputs[0], "ReduceMax")
    if most is None or compared.inputs[0] is not most.output or not _is(divided.inputs[1], by):
        return None
    last = most.attributes.get("axes") == (-1,) and most.attributes.get("keepdims", 1)
    return (x, scale) if last and _made_by_input(most.inputs[0], "Abs") is x else None


def _made_by(value: Value | None, op: str, domain: str = "") -> Node | None:
    node = value.producer if value is not None else None
    return node if node is not None and node.is_a(op, domain) else None


def _made_by_input(value: Value | None, op: str) -> Value | None:
    """What an operator of one input made a value of."""
    node = _made_by(value, op)
    return node.inputs[0] if node is not None else None


def _beside(node: Node, number: float) -> Value | None:
    """The other operand of a node that has a number for one."""
    a, b = node.inputs
    return a if _is(b, number) else b if _is(a, number) else None


def _is(value: Value | None, number: float) -> bool:
    return value is not None and value.constant is not None and value.constant.scalar == number


def _only_reader(value: Value, op: str) -> Node | None:
    node = value.consumers[0] if value.consumers else None
    return node if node is not None and node.is_a(op) and sole(value, node) else None


def _known(value: Value | None) -> Constant | None:
    constant = value.constant if value is not None else None
    return constant if constant is not None and constant.is_known else None


def _weight(
    packed: Constant, scales: np.ndarray, zeros: np.ndarray | None, kind: str, block: int, K: int, dtype: DType
) -> Quantized | None:  # fmt: skip
    """A weight of codes as we pack them, scales [N, blocks] and zeros; None where its blocks are no groups."""
    if zeros is not None and (zeros == Format(kind).middle).all():
        zeros = None
    if scales.shape[1] == 1 or (_same(scales) and (zeros is None or _same(zeros))):
        group = None
        scales, zeros = scales[:, :1], None if zeros is None else zeros[:, :1]
    elif block in GROUPS:
        group = block
    elif block > GROUPS[-1] and block % GROUPS[-1] == 0:
        group, times = GROUPS[-1], block // GROUPS[-1]
        groups = -(-K // group)
        scales = np.repeat(scales, times, 1)[:, :groups]
        zeros = None if zeros is None else np.repeat(zeros, times, 1)[:, :groups]
    else:
        return None
    format = Format(kind, group, zeros is None)
    levels = None if zeros is None else Array.of(zeros, DType.UINT8)
    return Quantized(packed, _narrowest(scales), levels, format, K, dtype)


def _same(rows: np.ndarray) -> bool:
    return bool((rows == rows[:, :1]).all())


def _narrowest(scales: np.ndarray) -> Array:
    """Scales in the smallest type that holds them."""
    wide = scales.astype(np.float32)
    for dtype in (DType.FLOAT16, DType.BFLOAT16):
        with np.errstate(over="ignore"):
            if (wide.astype(dtype.numpy).astype(np.float32) == wide).all():
                return Array.of(wide, dtype)
    return Array.of(wide, DType.FLOAT32)


def _linear(graph: Graph, node: Node, x: Value, weight: Quantized, name: str, bias: Value | None) -> bool:
    product = emit(graph, node, "MatMul", [x, graph.constant(Transposed(weight), name)])
    return become(graph, node, product if bias is None else emit(graph, node, "Add", [product, bias]))
