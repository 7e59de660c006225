"""AWQ (arXiv:2306.00978): input channels that matter are made larger before weights are rounded, and what feeds them smaller.

A product W x becomes (W s)(x / s), s a scale for each input channel. The division is folded into what makes x, wherever all of
x's readers are products that take the scale: a norm's scale, or the rows of a product before. Nothing else is scaled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fuser.calibrating import Given, LayerWalk, Moments, Walk, matrix
from fuser.constants import Array, Constant, Joined, Transposed
from fuser.formats import Format
from fuser.graph import FUSER, MICROSOFT, Graph, Node, Value
from fuser.onnx_weights import ByRows, holds_codes
from fuser.quantized import Codes
from fuser.tensors import tensor_of

STEPS = 20  # of the exponent, from 0 on
SMALLEST = 1e-4  # mean magnitude of a channel that is told from none
# Where norms have their scale and, if any, their bias.
NORMS = {
    ("LayerNormalization", ""): (1, 2), ("RMSNormalization", ""): (1,), ("SimplifiedLayerNormalization", ""): (1,),
    ("SkipLayerNormalization", MICROSOFT): (2, 3), ("SkipSimplifiedLayerNormalization", MICROSOFT): (2,),
    ("layer_norm", FUSER): (1, 2), ("rms_norm", FUSER): (1,),
    ("skip_layer_norm", FUSER): (2, 3), ("skip_rms_norm", FUSER): (2,),
}  # fmt: skip
Weighed = tuple[Tensor, Format]  # a weight [N, K] that is to be rounded


def best_scales(weights: Sequence[Weighed], moments: Moments) -> Tensor:
    """Scales [K] of weights' input channels: the mean magnitude of each channel, to the power that makes products nearest.

    The power is one of 0, 1/20, .. 19/20, and scales are divided by the geometric mean of the largest and the least. Errors
    are of weights rounded to the nearest codes; of equal ones the least power is taken.
    """
    device = weights[0][0].device
    magnitude = moments.magnitude.to(device).clamp(min=SMALLEST)
    moment = moments.sum.to(device, torch.float32)
    least, best = torch.inf, torch.ones_like(magnitude)
    for step in range(STEPS):
        scales = magnitude ** (step / STEPS)
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        total = 0.0
        for weight, format in weights:
            error = Codes.of(weight.float() * scales, format).weight / scales - weight.float()
            total += float(((error @ moment) * error).sum())
        if total < least:
            least, best = total, scales
    return best


# Graphs

Products = Mapping[Node, tuple[Constant, Format | None]]  # weights [K, N], and what they are to be rounded to
Place = tuple[Node, int, slice]  # a constant that a node reads, and which of its last axis


def scale_graph(
    graph: Graph,
    products: Products,
    windows: Sequence[Tensor],
    device: torch.device | None,
    note: Callable[[str], None],
) -> None:
    """Scales the weights of a graph's products; what the graph computes stays, but for rounding. Weights are scaled when read.

    Args:
        products: all that have a weight, in order.
        windows: of token ids [S] that it is computed on.
    """
    walk = Walk(graph, windows, device)
    found: list[tuple[list[Node], list[Place], np.ndarray]] = []
    seen: set[Value] = set()
    for node in products:
        x = node.inputs[0]
        if x is None or x in seen:
            continue
        seen.add(x)
        readers, places = _readers(x, products), _places(x, products)
        if readers is None or places is None:
            continue
        note(node.origin.module or node.output.name)
        moments = walk.moments(node)
        weights = [(tensor_of(products[one][0]).T, products[one][1]) for one in readers]
        rounded = [(weight.to(moments.sum.device), format) for weight, format in weights if format is not None]
        if rounded:
            found.append((readers, places, best_scales(rounded, moments).cpu().numpy()))
    for readers, places, scales in found:
        for node in readers:
            _replace(graph, node, 1, _down(_weight(node, products), scales))
        for node, index, part in places:
            value = node.inputs[index]
            assert value is not None
            held = value.constant or _weight(node, products)
            factors = np.ones(held.shape[-1], np.float32)
            factors[part] = 1 / scales
            _replace(graph, node, index, _across(held, factors))


def _weight(node: Node, products: Products) -> Constant:
    """The weight [K, N] as it is now."""
    value = node.inputs[1]
    return value.constant if value is not None and value.constant is not None else products[node][0]


def _readers(x: Value, products: Products) -> list[Node] | None:
    """The products that read a value, if nothing else does and none has codes already."""
    readers = x.consumers
    if x.pinned or any(index for _, index in x.uses):
        return None
    return readers if all(node in products and not holds_codes(products[node][0]) for node in readers) else None


def _places(x: Value, products: Products) -> list[Place] | None:
    """The constants that are to be divided for a value [.., K] to be; None: there are none that change nothing else."""
    node = x.producer
    if node is None or not x.shape or x.dtype is None or not x.dtype.is_float:
        return None
    K, whole = x.shape[-1], slice(None)

    def inner(index: int) -> list[Place] | None:
        value = node.inputs[index]
        if value is None or value.pinned or len(value.uses) > 1 or not value.shape or value.shape[-1] != K:
            return None
        return _places(value, products)

    def is_vector(index: int) -> bool:
        value = node.input(index)
        return value is not None and value.constant is not None and value.shape is not None and value.shape[-1:] == (K,)

    key = node.op, node.domain
    if key in NORMS and x.index == 0:
        given = [index for index in NORMS[key] if node.input(index) is not None]
        return [(node, index, whole) for index in given] if all(map(is_vector, given)) else None
    if node in products and not holds_codes(products[node][0]):
        if node.is_a("MatMul"):
            return [(node, 1, whole)]
        start = sum(node.attributes["sizes"][: x.index])
        given = [1, 2] if node.input(2) is not None else [1]
        return [(node, index, slice(start, start + node.attributes["sizes"][x.index])) for index in given]
    if node.is_a("gated_mlp", FUSER):
        return inner(1)
    if not node.domain and node.op in ("Cast", "Identity", "Relu"):
        return inner(0)
    if node.is_a("Add") and (is_vector(0) or is_vector(1)):
        bias = 0 if is_vector(0) else 1
        before = inner(1 - bias)
        return None if before is None else [*before, (node, bias, whole)]
    if node.is_a("Mul"):
        vector = next((index for index in (0, 1) if is_vector(index)), None)
        return [(node, vector, whole)] if vector is not None else inner(0) or inner(1)
    return None


def _replace(graph: Graph, node: Node, index: int, constant: Constant) -> None:
    value = node.inputs[index]
    assert value is not None
    graph.set_input(node, index, graph.constant(constant, f"{value.name}_scaled"))


def _across(constant: Constant, factors: np.ndarray) -> Constant:
    """A constant [.., N] multiplied by factors [N]."""
    if len(constant.shape) == 1:
        return Array.of(constant.numpy().astype(np.float32) * factors, constant.dtype)
    if isinstance(constant, Joined):
        ends = np.cumsum([part.shape[-1] for part in constant.parts])[:-1]
        return Joined(tuple(map(_across, constant.parts, np.split(factors, ends))))
    return ByRows((constant,), constant.dtype, constant.shape, lambda rows: rows * factors)


def _down(weight: Constant, factors: np.ndarray) -> Constant:
    """A weight [K, N] whose rows are multiplied by factors [K]."""
    if isinstance(weight, Joined):
        return Joined(tuple(_down(part, factors) for part in weight.parts))
    return Transposed(_across(weight.base if isinstance(weight, Transposed) else Transposed(weight), factors))


# Modules


def scale_layer(walk: LayerWalk, formats: Mapping[nn.Module, Format]) -> None:
    """Scales the weights of linears in the layer where a walk stands; parameters are replaced, never written to.

    What divides the inputs of linears is found by trying: with scales that are powers of two the layer gives the same bits.
    It is the module that made the inputs, if it has vectors alone (a norm), or one of the layer's linears of that width.

    Args:
        formats: what linears are to be rounded to.
    """
    for given in walk.inputs():
        weights = [(matrix(part), formats[part]) for part in given.readers if part in formats]
        rounded = [(weight.detach(), format) for weight, format in weights if weight is not None]
        maker = next((maker for maker in _makers(walk, given) if _is_divisible(walk, maker, given)), None)
        if rounded and maker is not None:
            _scale(maker, given.readers, best_scales(rounded, given.moments))


def _is_divisible(walk: LayerWalk, maker: nn.Module, given: Given) -> bool:
    """Whether the layer stays what it is when a module's outputs are divided, and weights of what reads them multiplied."""
    total = given.moments.sum
    powers = 2.0 ** (torch.arange(len(total), device=total.device) % 3 - 1)
    before = walk.output()
    with _scaled(maker, given.readers, powers):
        return torch.equal(walk.output(), before)


def _makers(walk: LayerWalk, given: Given) -> Iterator[nn.Module]:
    """What may have to be divided for given inputs to be."""
    K = len(given.moments.sum)
    parameters = [] if given.maker is None else [*given.maker.parameters()]
    if given.maker is not None and parameters:
        if matrix(given.maker) is not None or all(held.shape == (K,) for held in parameters):
            yield given.maker
        return
    for part in walk.layer.modules():
        weight = matrix(part)
        if weight is not None and len(weight) == K and part not in given.readers:
            yield part


@contextmanager
def _scaled(maker: nn.Module, readers: Sequence[nn.Module], scales: Tensor) -> Iterator[None]:
    """Within, scales are applied."""
    held = [(part, name, value) for part in (maker, *readers) for name, value in part.named_parameters(recurse=False)]
    _scale(maker, readers, scales)
    try:
        yield
    finally:
        for part, name, value in held:
            setattr(part, name, value)


def _scale(maker: nn.Module, readers: Sequence[nn.Module], scales: Tensor) -> None:
    """Divides what a module gives by scales [K], and multiplies the columns of linears that read it."""
    for part in readers:
        _multiply(part, "weight", scales if isinstance(part, nn.Linear) else scales[:, None])
    for name, value in list(maker.named_parameters(recurse=False)):
        _multiply(maker, name, 1 / (scales[:, None] if value.dim() == 2 and isinstance(maker, nn.Linear) else scales))


def _multiply(part: nn.Module, name: str, factors: Tensor) -> None:
    value: Tensor = getattr(part, name)
    made = (value.detach().float() * factors.to(value.device)).to(value.dtype)
    setattr(part, name, nn.Parameter(made, requires_grad=False))
