"""The graph every stage reads and writes: values, nodes, and where each node came from.

Plain nodes have ONNX semantics; fused nodes and the two notations of our own (`Rsqrt`, `Dims`) live in the domain
`fuser`. Parameters that ONNX moved between attributes and inputs over the years (axes, split, Slice's bounds, Reshape's
shape) are attributes here once they are known, symbolic dims included; the exporter puts them back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import onnx
import sympy

from fuser import dims
from fuser.constants import Constant
from fuser.dims import Dim, Shape, text
from fuser.dtypes import DType

FUSER = "fuser"
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Origin:
    """Where a node came from: names of the source nodes it stands for, and the module path that held them."""

    sources: tuple[str, ...] = ()
    module: str = ""

    @staticmethod
    def union(origins: Iterable["Origin"]) -> "Origin":
        """All sources, in order, under the longest module path common to those that have one."""
        sources: dict[str, None] = {}
        common: list[str] | None = None
        for origin in origins:
            sources.update(dict.fromkeys(origin.sources))
            if origin.module:
                path = origin.module.split(".")
                if common is None:
                    common = path
                else:
                    same = 0
                    while same < min(len(common), len(path)) and common[same] == path[same]:
                        same += 1
                    common = common[:same]
        return Origin(tuple(sources), ".".join(common or ()))


@dataclass(eq=False, slots=True)
class Value:
    """A tensor in the graph: an input, a node's output, or a constant.

    `content` is what a small integer tensor holds where that is known symbolically: a tuple of dims for a vector, one
    dim for a scalar (and Python bools for comparisons of them).
    """

    name: str
    dtype: DType | None = None
    shape: Shape | None = None
    producer: "Node | None" = None
    index: int = 0
    constant: Constant | None = None
    content: Any = None
    uses: dict[tuple["Node", int], None] = field(default_factory=dict)
    captors: dict["Node", None] = field(default_factory=dict)  # nodes whose control-flow bodies read it by name
    is_output: bool = False
    defines: bool = False  # has a size that `Graph.dim_sources` finds here
    measured: bool = False  # ... and some node's attributes mention it

    @property
    def captured(self) -> bool:
        """Whether a control-flow body reads this value by name."""
        return bool(self.captors)

    @property
    def pinned(self) -> bool:
        """Whether something outside the nodes' own inputs reads this value."""
        return self.is_output or self.captured or self.measured

    @property
    def consumers(self) -> "list[Node]":
        """The nodes that read this value, each once, in order of first use."""
        return list(dict.fromkeys(node for node, _ in self.uses))

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def scalar(self) -> float | None:
        """The one number a constant holds in all its elements, else None."""
        return None if self.constant is None else self.constant.scalar

    def __repr__(self) -> str:
        return f"{self.name}:{self.dtype}{text(self.shape)}"


@dataclass(eq=False, slots=True)
class Node:
    """An operator applied to values. `carried` are ONNX attributes fuser does not interpret (control-flow bodies...)."""

    op: str
    inputs: list[Value | None]
    outputs: list[Value]
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    name: str = ""
    origin: Origin = Origin()
    carried: tuple[onnx.AttributeProto, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    captures: tuple[Value, ...] = ()
    place: float | None = None  # where it would stand in the order, its inputs permitting

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def is_a(self, op: str, domain: str = "") -> bool:
        return self.op == op and self.domain == domain

    def input(self, index: int) -> Value | None:
        """The input at `index`; None when it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def __repr__(self) -> str:
        outputs = ", ".join(v.name for v in self.outputs)
        inputs = ", ".join(v.name if v else "-" for v in self.inputs)
        attributes = "".join(
            f", {k}={v:g}" if isinstance(v, float) else f", {k}={v}" for k, v in self.attributes.items()
        )
        return f"{outputs} = {self.domain + '.' if self.domain else ''}{self.op}({inputs}{attributes})"


class Graph:
    """Nodes in topological order between named inputs and outputs."""

    def __init__(self, name: str = "", opset: int = 17) -> None:
        self.name = name
        self.opset = opset
        self.opsets: dict[str, int] = {}  # other domains
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.output_names: list[str] = []
        self.nodes: dict[Node, None] = {}
        self.names: set[str] = set()
        self.dim_sources: dict[Any, tuple[Value, int]] = {}  # symbol -> the value and axis that has it as its size
        self.learned: dict[sympy.Symbol, Dim] = {}  # what symbols have turned out to be, not yet put in their places
        self.header = onnx.ModelProto()  # what the source file said of itself, its graph left out
        self.interface: dict[str, onnx.ValueInfoProto] = {}  # inputs and outputs as the source declared them
        self.derived: dict[Any, Value] = {}  # merged weights, by what they are merged from
        self._counter = 0
        self._last_place = 0.0

    def fresh_name(self, stem: str) -> str:
        """A value name not used before; `stem` itself where it is free."""
        name = stem
        while not name or name in self.names:
            self._counter += 1
            name = f"{stem or 'v'}_{self._counter}"
        self.names.add(name)
        return name

    def constant(self, data: Constant, stem: str = "const") -> Value:
        """A constant value, not yet used by any node."""
        return Value(self.fresh_name(stem), data.dtype, data.shape, constant=data)

    def add(
        self,
        op: str,
        inputs: Iterable[Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: Iterable[str] | int = 1,
        like: Node | None = None,
    ) -> Node:
        """A new node, in the place and of the origin of `like`, else at the end; `outputs` are name stems or a count."""
        stems = [op.lower()] * outputs if isinstance(outputs, int) else list(outputs)
        node = Node(op, list(inputs), [], dict(attributes or {}), domain)
        if like is not None:
            node.origin, node.metadata, node.place = like.origin, like.metadata, like.place
        node.outputs = [Value(self.fresh_name(stem), producer=node, index=i) for i, stem in enumerate(stems)]
        self.insert(node)
        return node

    def insert(self, node: Node) -> None:
        """Adds a node whose inputs and outputs are already linked to it."""
        self.nodes[node] = None
        if node.place is None:
            self._last_place += 1.0
            node.place = self._last_place
        for i, value in enumerate(node.inputs):
            if value is not None:
                value.uses[(node, i)] = None
        for value in node.captures:
            value.captors[node] = None
        self.measure(node)

    def define(self, symbol: sympy.Symbol, value: Value, axis: int) -> None:
        """Says that `symbol` is the size of `value` along `axis`; the first to say so for a symbol is asked for it."""
        if symbol not in self.dim_sources:
            self.dim_sources[symbol] = (value, axis)
            value.defines = True

    def measure(self, node: Node) -> None:
        """Keeps the values whose sizes a node's attributes mention."""
        for symbol in mentioned(node):
            self.dim_sources[symbol][0].measured = True

    def learn(self) -> int:
        """Puts what a dim has turned out to be in the place of its symbol, everywhere; returns how many were learned."""
        learned, self.learned = self.learned, {}
        for value in self.values():
            value.measured = False
            if learned:
                value.shape, value.content = (dims.replace(part, learned) for part in (value.shape, value.content))
        for node in self.nodes:
            if learned:
                node.attributes = {name: dims.replace(item, learned) for name, item in node.attributes.items()}
            self.measure(node)
        return len(learned)

    def remove(self, node: Node) -> None:
        """Takes a node out; its outputs must have no reader left."""
        for i, value in enumerate(node.inputs):
            if value is not None:
                value.uses.pop((node, i), None)
        for value in node.captures:
            value.captors.pop(node, None)
        del self.nodes[node]

    def set_input(self, node: Node, index: int, value: Value | None) -> None:
        old = node.inputs[index]
        if old is not None:
            old.uses.pop((node, index), None)
        node.inputs[index] = value
        if value is not None:
            value.uses[(node, index)] = None

    def drop_inputs(self, node: Node, keep: int) -> None:
        """Removes the inputs from `keep` on."""
        while len(node.inputs) > keep:
            self.set_input(node, len(node.inputs) - 1, None)
            node.inputs.pop()

    def replace(self, old: Value, new: Value) -> None:
        """Makes every reader of `old` read `new`. A value captured by name keeps its producer for that reader."""
        for node, i in list(old.uses):
            self.set_input(node, i, new)
        if old.is_output:
            self.outputs = [new if value is old else value for value in self.outputs]
            old.is_output, new.is_output = False, True
        if old.defines:
            self.dim_sources.update({s: (new, axis) for s, (v, axis) in self.dim_sources.items() if v is old})
            new.defines, new.measured = True, new.measured or old.measured
            old.defines = old.measured = False

    def clone(self) -> "Graph":
        """A copy that shares constants and protobufs with this graph, and nothing that passes change."""
        copy = Graph(self.name, self.opset)
        copy.opsets, copy.header, copy.interface = dict(self.opsets), self.header, self.interface
        copy.names, copy._counter, copy.output_names = set(self.names), self._counter, list(self.output_names)
        values: dict[int, Value] = {}
        for value in self.values():
            values[id(value)] = Value(
                value.name, value.dtype, value.shape, constant=value.constant, content=value.content,
                is_output=value.is_output, defines=value.defines, measured=value.measured,
            )  # fmt: skip
        copy.dim_sources = {s: (values[id(v)], axis) for s, (v, axis) in self.dim_sources.items() if id(v) in values}
        for node in self.nodes:
            twin = Node(
                node.op, [None if v is None else values[id(v)] for v in node.inputs], [values[id(v)] for v in node.outputs],
                dict(node.attributes), node.domain, node.name, node.origin, node.carried, node.metadata,
                tuple(values[id(v)] for v in node.captures),
            )  # fmt: skip
            for index, value in enumerate(twin.outputs):
                value.producer, value.index = twin, index
            copy.insert(twin)
        copy.inputs = [values[id(v)] for v in self.inputs]
        copy.outputs = [values[id(v)] for v in self.outputs]
        return copy

    def sort(self) -> None:
        """Restores topological order, each node as near to its place as its inputs allow."""
        order: nx.DiGraph = nx.DiGraph()
        order.add_nodes_from(self.nodes)
        order.add_edges_from((p, node) for node in self.nodes for p in self._before(node))
        self.nodes = dict.fromkeys(nx.lexicographical_topological_sort(order, key=lambda node: node.place))
        for place, node in enumerate(self.nodes):
            node.place = float(place)
        self._last_place = float(len(self.nodes))

    def prune(self) -> int:
        """Removes the nodes nothing reads; returns how many."""
        live: set[Node] = set()
        pending = [value.producer for value in self.outputs if value.producer is not None]
        while pending:
            node = pending.pop()
            if node not in live:
                live.add(node)
                pending.extend(self._before(node))
        dead = [node for node in self.nodes if node not in live]
        for node in dead:
            self.remove(node)
        return len(dead)

    def _before(self, node: Node) -> Iterator[Node]:
        """The nodes that must run before `node`, for its inputs or for the sizes its attributes mention."""
        yield from producers(node)
        for symbol in mentioned(node):
            producer = self.dim_sources[symbol][0].producer
            if producer is not None and producer is not node:  # a Reshape's own -1 may be named in its shape
                yield producer

    def values(self) -> Iterator[Value]:
        """Every value the graph uses, each once: inputs, then by node."""
        seen: set[int] = set()
        for value in self.inputs:
            seen.add(id(value))
            yield value
        for node in self.nodes:
            for used in (*node.inputs, *node.captures, *node.outputs):
                if used is not None and id(used) not in seen:
                    seen.add(id(used))
                    yield used
        for value in self.outputs:
            if id(value) not in seen:
                seen.add(id(value))
                yield value

    def constants(self) -> list[Value]:
        return [value for value in self.values() if value.constant is not None]

    def validate(self) -> None:
        """Checks the invariants every stage must leave intact: order, links, one producer a value. For our own tests."""
        ready = {id(value) for value in self.inputs}
        for node in self.nodes:
            for i, value in enumerate(node.inputs):
                if value is None:
                    continue
                assert (node, i) in value.uses, f"{value} does not know its reader {node}"
                assert value.producer is None or value.producer in self.nodes, f"{node} reads {value} of a removed node"
                assert value.constant is not None or id(value) in ready, f"{node} reads {value} before it is made"
            for symbol in mentioned(node):
                source = self.dim_sources[symbol][0]
                assert source.measured, f"{source} does not know that {node} mentions {symbol}"
                assert source.producer in (None, node) or id(source) in ready, f"{node} mentions {symbol} of {source}"
            for value in node.captures:
                assert value.constant is not None or id(value) in ready, f"{node} captures {value} before it is made"
            for i, value in enumerate(node.outputs):
                assert value.producer is node and value.index == i, f"{value} does not know its producer"
                assert id(value) not in ready, f"{value} is made twice"
                assert all(reader in self.nodes for reader, _ in value.uses), f"{value} is read by a removed node"
                ready.add(id(value))
        for value in self.outputs:
            assert value.constant is not None or id(value) in ready, f"output {value} is never made"
            assert value.is_output, f"output {value} does not know it is one"

    def __str__(self) -> str:
        return "\n".join(map(repr, self.nodes))


def mentioned(node: Node) -> Iterator[sympy.Symbol]:
    """The symbols of the dims in a node's attributes."""
    for attribute in node.attributes.values():
        for item in attribute if isinstance(attribute, tuple) else (attribute,):
            if isinstance(item, sympy.Expr):
                yield from sorted(item.free_symbols, key=str)


def producers(node: Node) -> Iterator[Node]:
    """The nodes that must run before `node`."""
    for value in (*node.inputs, *node.captures):
        if value is not None and value.producer is not None:
            yield value.producer


def readers(value: Value) -> Iterator[Node]:
    """The nodes that must run after `value` is made."""
    yield from value.consumers
    yield from value.captors


def reaches(starts: Iterable[Value], stop: Callable[[Node], bool]) -> set[Node]:
    """Every node reachable forward from `starts`, not passing through a node for which `stop` holds."""
    found: set[Node] = set()
    pending = [node for value in starts for node in readers(value)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if not stop(node):
                pending.extend(user for value in node.outputs for user in readers(value))
    return found


def is_static(value: Value | None, depth: int = 10) -> bool:
    """Whether a value is computed from constants and sizes alone, in at most `depth` steps (a quantized weight, say)."""
    if value is None or value.constant is not None:
        return True
    node = value.producer
    if node is None or depth == 0:
        return False
    return node.is_a("Dims", FUSER) or (bool(node.inputs) and all(is_static(v, depth - 1) for v in node.inputs))


__all__ = [
    "FUSER",
    "MICROSOFT",
    "Dim",
    "Graph",
    "Node",
    "Origin",
    "Value",
    "is_static",
    "mentioned",
    "producers",
    "reaches",
    "readers",
]
