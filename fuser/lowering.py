"""From fused nodes to what a target runs: contrib and standard operators, or functions with bodies of standard ones."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx

from fuser.constants import Array, Constant
from fuser.content import content
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.errors import UsageError
from fuser.fused import REGISTRY, FusedOp, Lowering
from fuser.graph import FUSER, MICROSOFT, Graph, Node, Origin, Value
from fuser.onnx_nodes import Reference, node_proto
from fuser.onnx_weights import holds_codes
from fuser.products import Say, dequantized, opset_of, product, tell_of_scales
from fuser.shapes import infer_node
from fuser.spelling import PARAMETERS, Spelling

TARGETS = {
    "ort": "standard and com.microsoft operators that stock ONNX Runtime runs on CPU and CUDA",
    "onnx": "standard operators only, of opset 23 where the model allows, for any ONNX runtime",
    "functions": "fused nodes in the domain 'fuser', each with a body of standard operators",
}


class Emitter:
    """`op.Name(...)` adds a node to a graph; what lowerings are written with."""

    FLOAT = DType.FLOAT32.onnx

    def __init__(
        self, graph: Graph, like: Node | None = None, domain: str = "", shared: dict[Any, Any] | None = None,
        target: str = "",
    ) -> None:  # fmt: skip
        self._graph, self._like, self._domain, self._target = graph, like, domain, target
        self._shared = {} if shared is None else shared

    @property
    def opset(self) -> int:
        """The opset of the standard operators."""
        return self._graph.opset

    @property
    def microsoft(self) -> "Emitter":
        """The operators ONNX Runtime contributes."""
        return Emitter(self._graph, self._like, MICROSOFT, self._shared, self._target)

    @property
    def node(self) -> Node | None:
        """The fused node that is lowered."""
        return self._like

    def once(self, key: Any, make: Callable[["Emitter"], Any], after: Value | None = None) -> Any:
        """What `make` emits right behind `after`, or of sizes alone, shared by all that ask for the same key."""
        key = (id(after), key)
        if key not in self._shared:
            like = None if after is None else after.producer
            self._shared[key] = make(Emitter(self._graph, like, self._domain, self._shared, self._target))
        return self._shared[key]

    def take_over(self, node: Node, outputs: Mapping[int, Value]) -> None:
        """Lowers another fused node too: these are its outputs; nothing may read the others any more."""
        for index, new in outputs.items():
            if new.producer is not None:
                new.producer.origin = Origin.union((new.producer.origin, node.origin))
            _provide(self._graph, node.outputs[index], new)
        self._graph.remove(node)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self.plain, name)

    def plain(self, name: str, *inputs: Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """A node of an operator by its name, whatever its inputs hold."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        stem = self._like.output.name if self._like else name.lower()
        node = self._graph.add(name, given, attributes, domain=self._domain, outputs=[stem] * outputs, like=self._like)
        infer_node(self._graph, node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def MatMul(self, a: Value, b: Value) -> Any:  # noqa: N802  (an operator)
        """A product; by codes, where b is a weight that holds some."""
        return product(self, a, b, self._target) if holds_codes(b.constant) else self.plain("MatMul", a, b)

    def constant(self, data: Any, dtype: DType, stem: str = "const") -> Value:
        return self.held(Array.of(data, dtype), stem)

    def held(self, data: Constant, stem: str) -> Value:
        """A constant value."""
        return self._graph.constant(data, stem)

    def size(self, shape: Value, axis: int) -> Value:
        """The int64 scalar that a vector of sizes holds at `axis`."""
        known = content(shape)
        if known is None:
            element: Value = self.Gather(shape, self.constant((axis,), DType.INT64), axis=0)
            scalar: Value = self.Squeeze(element, axes=(0,))
            return scalar
        return self.dims(known[axis])

    def dims(self, wanted: Dim | Shape) -> Value:
        """An int64 scalar or vector that holds dims."""
        node = self._graph.add("Dims", [], {"dims": wanted}, domain=FUSER, outputs=["dims"], like=self._like)
        infer_node(self._graph, node)
        return node.output

    def CastLike(self, value: Value, like: Value) -> Any:  # noqa: N802  (an operator)
        """As a Cast: the type is known, and CastLike is younger than the oldest opset."""
        assert like.dtype is not None
        return value if value.dtype is like.dtype else self.Cast(value, to=like.dtype.onnx)

    def scalar_like(self, number: float, value: Value) -> Any:
        """`number` in the type of `value`."""
        return self.CastLike(self.Constant(value_float=number), value)

    def widened(self, value: Value) -> Any:
        """`value` in float32, or in float64 where it is that."""
        return value if value.dtype is DType.FLOAT64 else self.Cast(value, to=self.FLOAT)

    def number(self, number: Any, wide: Value) -> Any:
        """A function's float attribute in the type of a widened value."""
        found = self.Constant(value_float=number)
        return self.CastLike(found, wide) if wide.dtype is DType.FLOAT64 else found

    def ones_like_last(self, value: Value) -> Value:
        """Ones as long as the last axis of `value`, for operators that insist on a weight."""
        assert value.shape is not None and isinstance(value.shape[-1], int) and value.dtype is not None
        return self.constant(np.ones(value.shape[-1]), value.dtype, "ones")


def _silent(note: str) -> None:
    """Tells nobody."""


def lower(graph: Graph, target: str, say: Say = _silent) -> list[onnx.FunctionProto]:
    """Rewrites a graph into what `target` runs, in ONNX's spelling; returns the functions it needs.

    `say` is told of quantized weights that the target has no codes for.

    Raises:
        UsageError: there is no such target.
    """
    if target not in TARGETS:
        raise UsageError(f"there is no target '{target}'; targets are {', '.join(TARGETS)}")
    _raise_opset(graph, target)
    tell_of_scales(graph, target, say)
    functions = _Functions(graph.opset) if target == "functions" else None
    shared: dict[Any, Any] = {}
    # Backwards: a node that is lowered sees the fused nodes it reads, and may take them over.
    for node in reversed(list(graph.nodes)):
        operator = REGISTRY.get(node.op) if node.domain == FUSER else None
        if node not in graph.nodes:
            continue
        if operator is None:
            if node.is_a("MatMul") and (weight := node.inputs[1]) is not None and holds_codes(weight.constant):
                _replace(graph, node, Emitter.MatMul, target, shared)
        elif functions is not None:
            functions.call(node, operator)
        else:
            node.inputs += [None] * (len(operator.signature.inputs) - len(node.inputs))
            _replace(graph, node, operator.lowering(target), target, shared)
    dequantized(graph, lambda node: Emitter(graph, node), say)
    Spelling(graph).spell()
    return list(functions.bodies.values()) if functions is not None else []


def _raise_opset(graph: Graph, target: str) -> None:
    """Moves a graph to the opset its fused nodes would like, if that changes no node's meaning."""
    fused = (REGISTRY[n.op].opsets.get(target, 0) for n in graph.nodes if n.domain == FUSER and n.op in REGISTRY)
    wanted = max((opset_of(graph, target), *fused))
    plain = {node.op for node in graph.nodes if not node.domain}
    if (
        wanted > graph.opset
        and not any(n.carried for n in graph.nodes)
        and all(_carries_over(op, graph.opset, wanted) for op in plain)
    ):
        graph.opset = wanted


def _carries_over(op: str, old: int, new: int) -> bool:
    """Whether an operator means the same in a newer opset, as its schema tells: nothing taken away, no default changed."""
    try:
        before, after = onnx.defs.get_schema(op, old), onnx.defs.get_schema(op, new)
    except onnx.defs.SchemaError:
        return False
    if before.since_version == after.since_version or op in PARAMETERS:
        return True
    same = all(
        name in after.attributes and after.attributes[name].default_value == attribute.default_value
        for name, attribute in before.attributes.items()
    )
    return (
        same
        and before.min_input == after.min_input
        and [i.name for i in before.inputs] == [i.name for i in after.inputs][: len(before.inputs)]
    )


def _replace(graph: Graph, node: Node, lowering: Lowering, target: str, shared: dict[Any, Any]) -> None:
    found = lowering(Emitter(graph, node, shared=shared, target=target), *node.inputs, **node.attributes)
    graph.remove(node)
    for old, new in zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=True):
        _provide(graph, old, new)


def _provide(graph: Graph, old: Value, new: Value) -> None:
    """The old value stays, with its name and its readers (a control-flow body among them); only its producer is new."""
    maker = new.producer
    if maker is None:
        maker = graph.add("Identity", [new])
        maker.output.dtype, maker.output.shape = new.dtype, new.shape
        new = maker.output
    graph.replace(new, old)
    maker.outputs[new.index] = old
    old.producer, old.index = maker, new.index


class _Functions:
    """The functions a graph calls, one for each distinct body."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.bodies: dict[tuple[str, bytes], onnx.FunctionProto] = {}

    def call(self, node: Node, operator: FusedOp) -> None:
        floats = {name: value for name, value in node.attributes.items() if isinstance(value, float) and value}
        baked = {name: value for name, value in node.attributes.items() if name not in floats}
        stem = operator.kind_of(node)
        body = self._body(node, operator, floats, baked)
        # What the inputs' shapes and types change in a body is seen in the body.
        key = (stem, body.SerializeToString(deterministic=True))
        if key not in self.bodies:
            number = 1 + sum(kind == stem for kind, _ in self.bodies)
            body.name = stem if number == 1 else f"{stem}_{number}"
            self.bodies[key] = body
        node.op = self.bodies[key].name
        node.attributes = floats

    def _body(
        self, node: Node, operator: FusedOp, floats: dict[str, float], baked: dict[str, Any]
    ) -> onnx.FunctionProto:
        body = Graph(operator.name, self.opset)
        arguments = operator.signature.inputs
        inputs: list[Value | None] = []
        for i, argument in enumerate(arguments):
            given = node.input(i)
            inputs.append(None if given is None else Value(body.fresh_name(argument.name), given.dtype, given.shape))
        body.inputs = [value for value in inputs if value is not None]
        attributes = {**baked, **{attribute: Reference(attribute) for attribute in floats}}
        found = operator.lowering("functions")(Emitter(body), *inputs, **attributes)
        body.outputs = list(found) if isinstance(found, (tuple, list)) else [found]
        for value in body.outputs:
            value.is_output = True
        Spelling(body, any_rank=True).spell()
        return function_proto(body, list(floats))


def function_proto(body: Graph, attributes: Sequence[str]) -> onnx.FunctionProto:
    """A graph as a function in fuser's domain; its constants become Constant nodes."""
    nodes = [
        onnx.helper.make_node("Constant", [], [value.name], value=onnx.numpy_helper.from_array(value.constant.numpy()))
        for value in body.constants()
        if value.constant is not None
    ]
    nodes += [node_proto(node) for node in body.nodes]
    return onnx.helper.make_function(
        FUSER,
        body.name,
        [value.name for value in body.inputs],
        [value.name for value in body.outputs],
        nodes,
        [onnx.helper.make_opsetid("", body.opset)],
        attributes=list(attributes),
    )


__all__ = ["TARGETS", "Emitter", "lower"]
