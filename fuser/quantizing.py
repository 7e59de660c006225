"""`fuser.quantize(model, "int4")`: weights rounded to codes, of a module or of a graph, one after another."""

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fuser.calibrating import LayerWalk, Moments, Walk, matrix, windows_of
from fuser.calibration import clipped, gptq
from fuser.constants import Constant, Joined, Transposed
from fuser.errors import InputError, UsageError
from fuser.formats import Format, format_of
from fuser.graph import FUSER, Graph, Node, Value
from fuser.quantized import Codes, DoubledScales, Quantized, dequantize, fake_quantize
from fuser.scaling import scale_graph, scale_layer
from fuser.tensors import Held, tensor_of, to_constant

Model = TypeVar("Model", nn.Module, Graph)
Note = Callable[[str], None]
Record = Callable[[Tensor, Codes], None]  # is told of each weight [N, K], and what it became
# How a weight [N, K] of a name becomes codes.
Rounding = Callable[[str, Tensor, Format], Codes]
METHODS = ("gptq", "awq")  # of calibration
# What leads from the last product to the logits.
AFTER_HEAD = frozenset({"Cast", "Mul", "Div", "Add", "Tanh", "Reshape", "Identity", "Slice", "Clip", "Neg"})


@dataclass(frozen=True)
class Choices:
    """Which weight takes which format.

    Attributes:
        format: of every linear, where nothing else is said.
        overrides: glob of a module's path -> format, or None: kept as it is; the last that matches counts. A glob also
            matches what is below it.
        head: whether the product that makes the logits is quantized where no override names it.
        clip: whether scales are searched that make the squared error least, in place of those that reach every weight.
        windows: of token ids [S] to calibrate with; none: weights are rounded by themselves.
        method: of calibration, `gptq` or `awq`.
    """

    format: Format
    overrides: Mapping[str, Format | None] = field(default_factory=dict)
    head: bool = False
    clip: bool = False
    windows: tuple[Tensor, ...] = ()
    method: str = "gptq"

    def __str__(self) -> str:
        way = f" {self.method}" if self.windows else " clip" if self.clip else ""
        return f"{self.format}{way}"

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded by themselves."""
        return least_squares if self.clip else nearest

    @property
    def scales(self) -> bool:
        """Whether input channels are scaled before weights are rounded."""
        return bool(self.windows) and self.method == "awq"

    def calibrated(self, moments: Moments) -> Rounding:
        """How the weights of inputs like these are rounded."""
        return by_clipping(moments) if self.method == "awq" else by_moments(moments)

    def of(self, path: str, *, is_head: bool) -> Format | None:
        """The format of the linear at a module's path."""
        found = None if is_head and not self.head else self.format
        for glob, format in self.overrides.items():
            if fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"{glob}.*"):
                found = format
        return found


def choices(
    format: str | Format, *, group_size: int | None = None, symmetric: bool | None = None,
    overrides: Mapping[str, str | Format | None] | None = None, keep: Sequence[str] = (), head: bool = False,
    clip: str | None = None, calibration: Any = None, method: str = "gptq", tokenizer: Any = None,
) -> Choices:  # fmt: skip
    """The choices that arguments name, as of `quantize`.

    Raises:
        UsageError: there is no such format, or an argument cannot be.
    """
    if clip not in (None, "mse"):
        raise UsageError(f"clip is mse or None, not {clip!r}")
    if method not in METHODS:
        raise UsageError(f"the method of calibration is {' or '.join(METHODS)}, not {method!r}")
    windows = () if calibration is None else windows_of(calibration, tokenizer)
    given: dict[str, Format | None] = dict.fromkeys(keep)
    given |= {glob: None if name is None else format_of(name) for glob, name in (overrides or {}).items()}
    return Choices(format_of(format, group_size, symmetric), given, head, clip is not None, windows, method)


def nearest(name: str, weight: Tensor, format: Format) -> Codes:
    """Codes nearest to the weights."""
    return Codes.of(weight, format)


def unfilled(name: str, weight: Tensor, format: Format) -> Codes:
    """Codes without elements, on `meta`: of a weight that has none, or to see what a model would become."""
    row = Codes.of(torch.zeros(1, weight.shape[1]), format)

    def rows(one: Tensor) -> Tensor:
        return torch.empty(len(weight), one.shape[1], dtype=one.dtype, device="meta")

    return Codes(rows(row.packed), rows(row.scales), None if row.zeros is None else rows(row.zeros), format, row.width)


def least_squares(name: str, weight: Tensor, format: Format, importance: Tensor | None = None) -> Codes:
    """Codes nearest to the weights by scales that make the squared error least, weighed as `clipped` says."""
    return Codes.by(weight, *clipped(weight, format, importance), format)


def by_moments(moments: Moments) -> Rounding:
    """Codes that make what a product gives for inputs like these nearest."""

    def rounding(name: str, weight: Tensor, format: Format) -> Codes:
        return gptq(weight, moments.factor.to(weight.device), format, moments.importance.to(weight.device))

    return rounding


def by_clipping(moments: Moments) -> Rounding:
    """Codes nearest to the weights by scales of which each makes what its group adds to a product nearest."""

    def rounding(name: str, weight: Tensor, format: Format) -> Codes:
        return least_squares(name, weight, format, moments.within(format).to(weight.device))

    return rounding


def quantize(
    model: Model, format: str | Format, *, group_size: int | None = None, symmetric: bool | None = None,
    overrides: Mapping[str, str | Format | None] | None = None, keep: Sequence[str] = (), head: bool = False,
    device: torch.device | str | None = None, rounding: Rounding | None = None, progress: Note | None = None,
    clip: str | None = None, calibration: Any = None, method: str = "gptq", tokenizer: Any = None,
) -> Model:  # fmt: skip
    """A module or a graph whose linears hold codes in place of weights; the one that is given stays as it is.

    Weights are rounded one after another, so that no more memory is taken than codes and the largest weight need.

    Args:
        model: a module gives a module that shares what is not quantized; a graph gives a graph.
        format: `int8`, `int4`, `nf4`, `w8a8` (int8 weights and inputs), `fp8` (E4M3 weights and inputs); with options
            as `int4:64`, `int8:channel`, `int4:128:asymmetric`, `nf4:64:double`.
        group_size: 32, 64 or 128 neighbours of a row that share a scale, in place of the format's own.
        symmetric: whether zero is in the middle of the codes.
        overrides: glob of a module's path -> format or None (kept), the last that matches counts.
        keep: globs of what is kept as it is.
        head: whether to quantize the product that makes the logits.
        device: where weights are rounded; by default where they are.
        rounding: how a weight becomes codes, in place of what the arguments below say.
        progress: called with the name of each weight.
        clip: `mse`: of each group, the range is cut by the factor (1, 0.99, ... 0.5) that makes its squared error least.
        calibration: windows of token ids, ids one after another, or a text, that the model is computed on, by a method. Scales
            are cut then too. A module needs a list of layers, and is given in evaluation mode.
        method: of calibration: `gptq` (arXiv:2210.17323): weights make good for one another what rounding changes in products;
            `awq` (arXiv:2306.00978): channels of inputs are scaled, where norms or products before can take that back.
        tokenizer: with `encode`, for a text.

    Raises:
        InputError: a weight is not finite, or has no elements.
        UsageError: there is no such format; nothing is left to quantize.
    """
    chosen = choices(
        format, group_size=group_size, symmetric=symmetric, overrides=overrides, keep=keep, head=head, clip=clip,
        calibration=calibration, method=method, tokenizer=tokenizer,
    )  # fmt: skip
    return quantized(model, chosen, device=device, rounding=rounding, progress=progress)


def quantized(
    model: Model,
    chosen: Choices,
    *,
    device: torch.device | str | None = None,
    rounding: Rounding | None = None,
    progress: Note | None = None,
    record: Record | None = None,
) -> Model:
    """The same, for choices that are made; `record` is told of a graph's weights and their codes."""
    note = progress or (lambda name: None)
    place = None if device is None else torch.device(device)
    if isinstance(model, Graph):
        return _graph(model.clone(), chosen, rounding, place, note, record)  # type: ignore[return-value]
    if isinstance(model, nn.Module):
        return _module(model, chosen, rounding, place, note)
    raise UsageError(f"quantize takes a module or a graph, not a {type(model).__name__}")


class QuantizedLinear(nn.Module):
    """y = x W^T + bias, W [N, K] held as codes; by the reference: W is made anew at each call."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    seconds: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.width, self.dtype = codes.format, codes.width, dtype
        self.register_buffer("codes", codes.packed)
        held, seconds = codes.doubled or (codes.scales, None)
        self.register_buffer("scales", held)
        self.register_buffer("zeros", codes.zeros)
        self.register_buffer("seconds", seconds)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, [N, K]."""
        held = self.codes, self.scales, self.zeros, self.seconds
        found: Tensor = dequantize(*held, str(self.format), self.width, self.dtype)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        if self.format.activations:
            x = fake_quantize(x, self.format.activations)
        return nn.functional.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Moves everything; another float type is that of the weight, and not of the scales."""
        probe = fn(torch.empty(0, dtype=self.dtype))
        scales, seconds = self.scales, self.seconds
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales, self.dtype = scales.to(self.scales.device), probe.dtype
        self.seconds = None if seconds is None else seconds.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.width}, out_features={len(self.codes)}, {self.format}"


def _module(
    module: nn.Module, chosen: Choices, rounding: Rounding | None, device: torch.device | None, note: Note
) -> nn.Module:
    shared = [*module.parameters(), *module.buffers()]
    made: nn.Module = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    embeddings: Any = getattr(made, "get_output_embeddings", None)
    head = embeddings() if embeddings is not None else None
    walk = LayerWalk(made, chosen.windows) if chosen.windows and rounding is None else None
    formats = {
        path: format for path, part in made.named_modules()
        if matrix(part) is not None and (format := chosen.of(path, is_head=part is head)) is not None
    }  # fmt: skip
    scaled: nn.Module | None = None
    for path, format in formats.items():
        note(path)
        if walk is not None and chosen.scales and walk.enter(path) and walk.layer is not scaled:
            scaled = walk.layer
            scale_layer(walk, {made.get_submodule(name): wanted for name, wanted in formats.items()})
        part: Any = made.get_submodule(path)
        weight = matrix(part)
        assert weight is not None
        if weight.is_meta:
            raise InputError(f"'{path}' has no elements to quantize: it is on the meta device")
        rounds = rounding or (chosen.calibrated(walk.moments(path)) if walk is not None else chosen.rounding)
        codes = rounds(path, weight.detach().to(device or weight.device), format).to(weight.device)
        made.set_submodule(path, QuantizedLinear(codes, part.bias, weight.dtype))
    if not formats:
        raise UsageError("nothing is quantized: the module has no linear that is not kept")
    return made.eval() if not module.training else made


def _graph(
    graph: Graph,
    chosen: Choices,
    rounding: Rounding | None,
    device: torch.device | None,
    note: Note,
    record: Record | None,
) -> Graph:
    heads, empty = _heads(graph), rounding is unfilled
    if chosen.scales and rounding is None:
        weights = {node: weight for node in graph.nodes if (weight := _weight(node)) is not None}
        products = {
            node: (weight, chosen.of(node.origin.module, is_head=node in heads)) for node, weight in weights.items()
        }
        scale_graph(graph, products, chosen.windows, device, note)
    walk = Walk(graph, chosen.windows, device) if chosen.windows and rounding is None else None
    made: dict[tuple[Any, Format], Quantized] = {}
    rounded: dict[tuple[Value, str], Value] = {}
    count = 0
    for node in list(graph.nodes):
        weight = _weight(node, known=not empty)
        format = chosen.of(node.origin.module, is_head=node in heads) if weight is not None else None
        if weight is None or format is None or any(isinstance(leaf, Quantized) for leaf in weight.leaves()):
            continue
        note(node.origin.module or node.output.name)
        rounds = rounding or (chosen.calibrated(walk.moments(node)) if walk is not None else chosen.rounding)

        def codes_of(part: Constant, format: Format = format, node: Node = node, rounds: Rounding = rounds) -> Constant:
            if isinstance(part, Joined):
                return Joined(tuple(codes_of(one) for one in part.parts))
            key = part.key, format
            if key not in made:
                rows = tensor_of(part).T
                codes = rounds(node.origin.module, rows.to(device or rows.device), format)
                if record is not None:
                    record(rows, codes)
                made[key] = constant_of(codes if empty else codes.to(rows.device), part)
            return Transposed(made[key])

        x = node.inputs[0]
        assert x is not None
        if format.activations:
            if (x, format.activations) not in rounded:
                rounding_node = graph.add(
                    "fake_quantize",
                    [x],
                    {"kind": format.activations},
                    domain=FUSER,
                    outputs=[f"{x.name}_rounded"],
                    like=node,
                )
                rounding_node.output.dtype, rounding_node.output.shape = x.dtype, x.shape
                rounded[x, format.activations] = rounding_node.output
            x = rounded[x, format.activations]
        value = graph.constant(codes_of(weight), f"{node.output.name}_codes")
        graph.set_input(node, 0, x)
        graph.set_input(node, 1, value)
        count += 1
    if not count:
        raise UsageError("nothing is quantized: the graph has no product with a weight that is not kept")
    graph.prune()
    graph.sort()
    return graph


def constant_of(codes: Codes, like: Constant) -> Quantized:
    """Codes as a constant that stands for a weight of the type of another."""
    held = Held if codes.packed.is_meta else to_constant
    zeros = None if codes.zeros is None else held(codes.zeros)
    scales = held(codes.scales) if codes.doubled is None else DoubledScales(*map(held, codes.doubled))
    return Quantized(held(codes.packed), scales, zeros, codes.format, codes.width, like.dtype)


def _weight(node: Node, *, known: bool = False) -> Constant | None:
    """The weight [K, N] of a product of rows with a matrix."""
    if not (node.is_a("MatMul") or node.is_a("packed_linear", FUSER)):
        return None
    value = node.inputs[1]
    found = value.constant if value is not None else None
    if found is None and value is not None and value.producer is not None and value.producer.is_a("Transpose"):
        stored = value.producer.inputs[0]
        found = Transposed(stored.constant) if stored is not None and stored.constant is not None else None
    if found is None or len(found.shape) != 2 or not found.dtype.is_float or (known and not found.is_known):
        return None
    return found


def _heads(graph: Graph) -> set[Node]:
    """The products that make the logits: each output that is no state comes of one by no other product."""
    found: set[Node] = set()
    pending = [value for value in graph.outputs if value.rank == 3 or value.rank == 2]
    seen: set[Value] = set()
    while pending:
        value = pending.pop()
        node = value.producer
        if node is None or value in seen:
            continue
        seen.add(value)
        if _weight(node) is not None:
            found.add(node)
        elif not node.domain and node.op in AFTER_HEAD:
            pending += [one for one in node.inputs if one is not None and one.constant is None]
    return found
