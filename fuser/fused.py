"""Fused operators: a reference function in torch, with what the compiler needs to know around it.

The reference is the meaning, the fallback and the oracle. Its signature states dims, so that shapes are inferred, matches
checked and test inputs drawn from it:

    @fused_op("x[*B, D], weight[D] -> y[*B, D]")
    def rms_norm(x, weight, *, eps): ...
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from fuser import dims
from fuser.constants import Constant
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.graph import FUSER, Graph, Node, Value
from fuser.pattern import Apply, Either, Joined, Match, Pattern, Result, Var, _apply, caller, require
from fuser.shapes import RULES, Inferred

Lowering = Callable[..., Any]
Inputs = dict[str, Value | Constant | None]


@dataclass(frozen=True)
class Argument:
    """One tensor of a signature: `weight[D]`, `bias[N]?` (optional), `*y[*B, N]` (any number)."""

    name: str
    dims: tuple[str, ...]
    optional: bool = False
    variadic: bool = False

    def __str__(self) -> str:
        return f"[{', '.join(self.dims)}]"


_ARGUMENT = re.compile(r"(\*?)(\w+)\[([^\]]*)\](\??)")


@dataclass(frozen=True)
class Signature:
    """`x[*B, D], past[P, D] -> y[*B, D], present[P + S, D]`: capitals are dims, `*B` any number of leading ones."""

    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]

    @classmethod
    def parse(cls, text: str) -> "Signature":
        def side(part: str) -> tuple[Argument, ...]:
            return tuple(
                Argument(name, tuple(d.strip() for d in inner.split(",") if d.strip()), bool(mark), bool(star))
                for star, name, inner, mark in _ARGUMENT.findall(part)
            )

        before, after = text.split("->")
        return cls(side(before), side(after))

    def bind(self, operator: str, values: Sequence[Value | None]) -> dict[str, Any]:
        """The dims of a call: name -> dim, `*B` -> tuple of dims.

        Raises:
            CheckFailed: an input has not the shape the signature states.
        """
        bound: dict[str, Any] = {}
        for argument, value in zip(self.inputs, values, strict=False):
            if value is None:
                require(argument.optional, f"{operator}: {argument.name} is missing")
                continue
            require(value.shape is not None, f"{operator}: the shape of {argument.name} is not known", value)
            self._bind_one(operator, argument, value, value.shape or (), bound)
        return bound

    def _bind_one(self, operator: str, argument: Argument, value: Value, shape: Shape, bound: dict[str, Any]) -> None:
        names = list(argument.dims)
        wanted: list[Any] = []
        if names and names[0].startswith("*"):
            lead = len(shape) - (len(names) - 1)
            require(lead >= 0, f"{operator}: {argument.name} must be {argument}, got {dims.text(shape)}", value)
            names[:1] = [f"{names[0]}.{i}" for i in range(lead)]
            wanted = [bound.get(names[i], shape[i]) for i in range(lead)]
            if bound.setdefault(argument.dims[0], lead) != lead:
                wanted.append(None)
        same = len(names) == len(shape) and None not in wanted
        for name, dim in zip(names, shape, strict=False):
            same &= bound.setdefault(name, dim) == dim
        known = ", ".join(f"{n}={bound[n]}" for n in argument.dims if not n.startswith("*") and n in bound)
        require(
            same,
            f"{operator}: {argument.name} must be {argument}"
            + (f" with {known}" if known else "")
            + f", got {dims.text(shape)}",
            value,
        )

    def output_shapes(self, bound: Mapping[str, Any]) -> list[Shape]:
        found: list[Shape] = []
        for argument in self.outputs:
            shape: list[Dim] = []
            for name in argument.dims:
                if name.startswith("*"):
                    shape.extend(bound[f"{name}.{i}"] for i in range(bound[name]))
                else:
                    shape.append(reduce(dims.add, (bound[term.strip()] for term in name.split("+"))))
            found.append(tuple(shape))
        return found


@dataclass(eq=False)
class Source:
    """One way exporters write a fused operator: a traced function, and how to read the match."""

    operator: "FusedOp"
    function: Callable[..., Any]
    outputs: tuple[Pattern, ...] = ()
    nodes: list[Apply] = field(default_factory=list)
    reader: Result | None = None  # the node behind the outputs, by which they are found
    _attributes: Callable[[Match], dict[str, Any]] | None = None
    _inputs: Callable[[Match], Inputs] | None = None

    def __post_init__(self) -> None:
        traced = self.function(*(Var(name) for name in inspect.signature(self.function).parameters))
        self.reader = traced.by if isinstance(traced, Joined) else None
        if isinstance(traced, Joined):
            traced = traced.outputs
        self.outputs = traced if isinstance(traced, tuple) else (traced,)
        seen: dict[int, None] = {}
        for pattern in (*self.outputs, self.reader):
            self._collect(pattern, seen)
        required = [node for node in self.nodes if self._is_required(node)]
        self.required = [self.reader.node] if self.reader is not None else required or self.nodes
        self.size = len(_fewest(self.outputs))

    @property
    def line(self) -> str:
        """`folder/file.py:line` of the function."""
        code = self.function.__code__
        return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_firstlineno}"

    def _collect(self, pattern: Pattern | None, seen: dict[int, None]) -> None:
        if pattern is None or id(pattern) in seen:
            return
        seen[id(pattern)] = None
        for inner in children(pattern):
            self._collect(inner, seen)
        if isinstance(pattern, Result) and pattern.node not in self.nodes:
            self.nodes.append(pattern.node)

    def _is_required(self, node: Apply) -> bool:
        return any(_always_uses(pattern, node) for pattern in self.outputs)

    def attributes(self, function: Callable[[Match], dict[str, Any]]) -> Callable[[Match], dict[str, Any]]:
        """Registers how the operator's attributes follow from a match; the place for `require`."""
        self._attributes = function
        return function

    def inputs(self, function: Callable[[Match], "Inputs"]) -> Callable[[Match], "Inputs"]:
        """Registers inputs that are not simply the variables of their names."""
        self._inputs = function
        return function

    def read(self, match: Match) -> tuple[list[Value | Constant | None], dict[str, Any]]:
        """Inputs and attributes of the fused node a match stands for."""
        attributes = self._attributes(match) if self._attributes else dict(match.attributes)
        given = self._inputs(match) if self._inputs else {}
        names = [argument.name for argument in self.operator.signature.inputs]
        return [given.get(name, match.values.get(name)) for name in names], attributes


def children(pattern: Pattern) -> Sequence[Pattern | None]:
    if isinstance(pattern, Result):
        return pattern.node.inputs
    if isinstance(pattern, Either):
        return pattern.alternatives
    return (pattern.present,) if hasattr(pattern, "present") else ()


def _fewest(patterns: Sequence[Pattern | None]) -> set[Apply]:
    """The nodes of a match that takes the shortest alternative everywhere."""
    found: set[Apply] = set()
    for pattern in patterns:
        if isinstance(pattern, Either):
            found |= min((_fewest([alternative]) for alternative in pattern.alternatives), key=len)
        elif isinstance(pattern, Result):
            found |= {pattern.node} | _fewest(pattern.node.inputs)
    return found


def _always_uses(pattern: Pattern | None, node: Apply) -> bool:
    """Whether every way to match `pattern` goes through `node`."""
    if isinstance(pattern, Either):
        return all(_always_uses(p, node) for p in pattern.alternatives)
    if isinstance(pattern, Result):
        return pattern.node is node or any(_always_uses(p, node) for p in pattern.node.inputs)
    return False


@dataclass(eq=False)
class FusedOp:
    """A fused operator: its reference function and everything declared about it."""

    name: str
    signature: Signature
    reference: Callable[..., Any]
    state: dict[str, str] = field(default_factory=dict)  # input that holds a state -> output that holds it afterwards
    sources: list[Source] = field(default_factory=list)
    lowerings: dict[str, Lowering] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    example_sets: list[dict[str, Any]] = field(default_factory=list)
    recognizer: Callable[[Any], None] | None = None  # of `fuser.recognition`
    recognizer_line: str = ""
    _shapes: Callable[..., Sequence[Shape]] | None = None
    _types: Callable[..., Sequence[DType | None]] | None = None
    _kind: Callable[[Node], str] | None = None

    def __call__(self, *inputs: Any, outputs: int | None = None, **attributes: Any) -> Any:
        """The reference function on tensors; a node of a pattern on patterns."""
        if any(isinstance(x, Pattern) for x in inputs):
            return _apply(self.name, inputs, attributes, FUSER, outputs or len(self.signature.outputs))
        return self.reference(*inputs, **attributes)

    def source(self, function: Callable[..., Any]) -> Source:
        """Declares a source graph: what exporters write for this operator."""
        self.sources.append(found := Source(self, function))
        return found

    def lowering(self, target: str) -> Lowering:
        """How the operator is written for a target; standard operators are what a function's body is made of."""
        return self.lowerings.get(target) or self.lowerings["functions"]

    def lower(self, target: str, *, opset: int = 0) -> Callable[[Lowering], Lowering]:
        """Declares how the operator is written for a target: `ort`, `onnx` (standard operators), or `functions` (a body of
        plain ones, which serves all targets that have none of their own).

        `opset` is the one the lowering would like; where the graph cannot be raised to it, `op.opset` says less.
        """

        def register(function: Lowering) -> Lowering:
            self.lowerings[target] = function
            self.opsets[target] = opset
            return function

        return register

    def shapes(self, function: Callable[..., Sequence[Shape]]) -> Callable[..., Sequence[Shape]]:
        """Declares output shapes the signature cannot state: f(bound dims, inputs, **attributes)."""
        self._shapes = function
        return function

    def types(self, function: Callable[..., Sequence[DType | None]]) -> Callable[..., Sequence[DType | None]]:
        """Declares the outputs' types where they are not the first input's: f(inputs, attributes)."""
        self._types = function
        return function

    def recognizes(self, function: Callable[[Any], None]) -> Callable[[Any], None]:
        """Declares how the operator is recognised by what it holds: f(Recognition), see `fuser.recognition`."""
        self.recognizer, self.recognizer_line = function, caller()
        return function

    def kind(self, function: Callable[[Node], str]) -> Callable[[Node], str]:
        """Declares the name reports count a node under, where it is not the operator's own."""
        self._kind = function
        return function

    def kind_of(self, node: Node) -> str:
        return self._kind(node) if self._kind else self.name

    def examples(self, *sets: dict[str, Any]) -> None:
        """Declares example calls for the generated tests: dims by letter (`B` a tuple) and attributes by name."""
        self.example_sets.extend(sets)

    def output_shapes(self, values: Sequence[Value | None], attributes: Mapping[str, Any]) -> list[Shape]:
        bound = self.signature.bind(self.name, values)
        return list(self._shapes(bound, values, **attributes)) if self._shapes else self.signature.output_shapes(bound)

    def evaluate(self, inputs: Sequence[torch.Tensor | None], attributes: Mapping[str, Any]) -> list[torch.Tensor]:
        found = self.reference(*inputs, **attributes)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def states(self, node: Node) -> list[tuple[Value, Value]]:
        """The (before, after) values of each state a node carries on."""
        inputs = {argument.name: node.input(i) for i, argument in enumerate(self.signature.inputs)}
        outputs = {argument.name: value for argument, value in zip(self.signature.outputs, node.outputs, strict=False)}
        pairs = ((inputs.get(before), outputs.get(after)) for before, after in self.state.items())
        return [(before, after) for before, after in pairs if before is not None and after is not None]

    def _infer(self, graph: Graph, node: Node) -> list[Inferred]:
        shapes = self.output_shapes(node.inputs, node.attributes)
        if self._types:
            return list(zip(self._types(node.inputs, node.attributes), shapes, strict=True))
        first = node.inputs[0]
        return [(first.dtype if first else None, shape) for shape in shapes]


REGISTRY: dict[str, FusedOp] = {}


def fused_op(signature: str, *, state: Mapping[str, str] | None = None) -> Callable[[Callable[..., Any]], FusedOp]:
    """Makes a fused operator of a reference function.

    Args:
        signature: its tensors and dims, see `Signature`.
        state: which inputs hold a state and which outputs hold it afterwards, e.g. `{"past_k": "present_k"}`: what lets a
            runtime keep that state elsewhere (a paged cache).
    """
    parsed = Signature.parse(signature)
    names = ({argument.name for argument in parsed.inputs}, {argument.name for argument in parsed.outputs})
    for before, after in (state or {}).items():
        if before not in names[0] or after not in names[1]:
            raise ValueError(f"state {before} -> {after}: '{signature}' has no such input and output")

    def make(function: Callable[..., Any]) -> FusedOp:
        operator = FusedOp(function.__name__, parsed, function, dict(state or {}))
        operator.__doc__ = function.__doc__
        REGISTRY[operator.name] = operator
        RULES[(FUSER, operator.name)] = operator._infer
        return operator

    return make
