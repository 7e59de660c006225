"""What a node is, in a form that two graphs share: its operator, its attributes as text, and structural keys.

A forward key says what a node computes of the graph's inputs, a backward key what becomes of what it makes: nodes of two
graphs with the same forward key compute the same, whatever anything is called (Weisfeiler and Leman's refinement, on a
graph without cycles, where one sweep each way is all of it).
"""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import onnx

from fuser.constants import Constant
from fuser.errors import FuserError
from fuser.graph import Graph, Node, Value
from fuser.onnx_nodes import read_attribute
from fuser.pattern import COMMUTATIVE

WHOLE_BYTES = 1 << 20  # of a larger constant some rows are compared
SAMPLED = 3  # places of a larger constant that are read
FEW = 8  # elements of a constant that are written out
WEIGHT = 16  # elements; a constant of more is a weight, which says which node reads it


def operator(node: Node) -> str:
    """`MatMul`, `fuser.attention`."""
    return f"{node.domain}.{node.op}" if node.domain else node.op


def attributes(node: Node) -> dict[str, str]:
    """A node's attributes as text, in the order of their names."""
    found = {name: _text(value) for name, value in node.attributes.items()}
    found |= {attribute.name: f"<{_body_size(attribute)} nodes>" for attribute in node.carried}
    return dict(sorted(found.items()))


@cache
def _defaults(op: str, domain: str, opset: int) -> dict[str, str]:
    """The defaults of a standard operator's attributes, as text."""
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return {}
    given = ((name, attribute.default_value) for name, attribute in schema.attributes.items())
    return {name: _text(read_attribute(default)) for name, default in given if default.type}


def _text(value: object) -> str:
    if isinstance(value, Constant):
        return constant_text(value)
    return f"{value:g}" if isinstance(value, float) else str(value)  # bytes and tuples as Python writes them


def _body_size(attribute: onnx.AttributeProto) -> int:
    return sum(len(body.node) for body in (attribute.g, *attribute.graphs))


def constant_text(constant: Constant) -> str:
    """`-1`, `(0, 2, 1, 3)`, `float32[64, 128]`."""
    if constant.size <= FEW and constant.is_known:
        elements = constant.numpy().reshape(-1).tolist()
        words = [f"{x:g}" if isinstance(x, float) else str(x) for x in elements]
        return words[0] if not constant.shape and words else f"({', '.join(words)})"
    return f"{constant.dtype}{list(constant.shape)}"


def digest(constant: Constant) -> Hashable:
    """What a constant holds: equal ones, equal digests. Of more than `WHOLE_BYTES`, a few rows are read."""
    rows = constant.shape[0] if constant.shape else 1
    if not constant.is_known:
        return (constant.dtype, constant.shape)
    if constant.nbytes <= WHOLE_BYTES:
        places = [(0, rows)]
    else:
        places = [(place, place + 1) for place in (rows * part // SAMPLED for part in range(SAMPLED))]
    hashed = hashlib.blake2b(digest_size=12)
    for start, stop in places:
        elements = constant.rows(start, stop)
        hashed.update(repr(elements.tolist()).encode() if elements.dtype == object else elements.tobytes())
    return (constant.dtype, constant.shape, hashed.digest())


@dataclass
class Table:
    """Small numbers for keys; two graphs that are compared share one."""

    numbers: dict[Hashable, int] = field(default_factory=dict)
    digests: dict[int, tuple[Constant, Hashable]] = field(default_factory=dict)

    def number(self, key: Hashable) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def digest(self, constant: Constant) -> Hashable:
        """The digest of a constant, read once."""
        if id(constant) not in self.digests:
            try:
                self.digests[id(constant)] = constant, digest(constant)
            except FuserError:  # its elements cannot be had; they are none of the diff's business
                self.digests[id(constant)] = constant, (constant.dtype, constant.shape)
        return self.digests[id(constant)][1]


@dataclass
class Structure:
    """A graph's nodes by number, and their keys."""

    graph: Graph
    table: Table

    def __post_init__(self) -> None:
        self.nodes: Sequence[Node] = list(self.graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.operators = [operator(node) for node in self.nodes]
        self.attributes = [attributes(node) for node in self.nodes]
        self.meant = [  # with what is not said
            {**_defaults(node.op, node.domain, self.graph.opset), **said}
            for node, said in zip(self.nodes, self.attributes, strict=True)
        ]

    def maker(self, value: Value | None) -> int | None:
        """The node that makes a value."""
        return None if value is None or value.producer is None else self.number[value.producer]

    def readers(self, number: int) -> list[tuple[int, int, int]]:
        """(output, node, input) of all that reads what a node makes."""
        return [
            (index, self.number[node], place)
            for index, value in enumerate(self.nodes[number].outputs)
            for node, place in value.uses
        ]

    @cached_property
    def own(self) -> list[int]:
        """What each node is by itself: operator, attributes, and the constants that it reads."""
        found = []
        for number, node in enumerate(self.nodes):
            constants = [
                self.table.digest(value.constant) if value is not None and value.constant is not None else None
                for value in node.inputs
            ]
            if self.operators[number] in COMMUTATIVE:
                constants.sort(key=str)
            bodies = tuple(attribute.SerializeToString(deterministic=True) for attribute in node.carried)
            held = tuple(self.table.digest(x) for _, x in sorted(node.attributes.items()) if isinstance(x, Constant))
            said = tuple(sorted(self.meant[number].items()))
            found.append(self.table.number((self.operators[number], said, held, bodies, tuple(constants))))
        return found

    @cached_property
    def weighty(self) -> list[int | None]:
        """`own` of the nodes that read a weight."""
        return [
            own
            if any(v is not None and v.constant is not None and v.constant.size > WEIGHT for v in node.inputs)
            else None
            for own, node in zip(self.own, self.nodes, strict=True)
        ]

    def forward(self, inputs: Sequence[Hashable]) -> list[int]:
        """A key for what each node computes, given what the graph's inputs are called in both graphs."""
        given = {id(value): label for value, label in zip(self.graph.inputs, inputs, strict=True)}
        found: list[int] = []
        for number, node in enumerate(self.nodes):
            read: list[Hashable] = []
            for value in (*node.inputs, *node.captures):
                if value is None or value.constant is not None:
                    read.append(None)
                elif value.producer is None:
                    read.append(("input", given.get(id(value))))
                else:
                    read.append((found[self.number[value.producer]], value.index))
            if self.operators[number] in COMMUTATIVE:
                read.sort(key=str)
            found.append(self.table.number(("forward", self.own[number], tuple(read))))
        return found

    def around(self, radius: int) -> list[int]:
        """A key for each node and what stands around it, as far as some links away."""
        found = list(self.own)
        for _ in range(radius):
            last = list(found)
            for number, node in enumerate(self.nodes):
                commute = self.operators[number] in COMMUTATIVE
                makers = [
                    (0 if commute else place, last[maker])
                    for place, maker in enumerate(map(self.maker, node.inputs))
                    if maker is not None
                ]
                readers = [(index, last[reader]) for index, reader, _ in self.readers(number)]
                key = ("around", last[number], tuple(sorted(makers)), tuple(sorted(readers)))
                found[number] = self.table.number(key)
        return found

    def backward(self) -> list[int]:
        """A key for what becomes of what each node makes."""
        places: dict[int, list[int]] = {}
        for index, value in enumerate(self.graph.outputs):
            places.setdefault(id(value), []).append(index)
        found = [0] * len(self.nodes)
        for number in reversed(range(len(self.nodes))):
            node = self.nodes[number]
            read = sorted(
                (index, found[reader], 0 if self.operators[reader] in COMMUTATIVE else place)
                for index, reader, place in self.readers(number)
            )
            given_out = tuple(tuple(places.get(id(value), ())) for value in node.outputs)
            captors = tuple(sorted(found[self.number[node]] for value in node.outputs for node in value.captors))
            key = ("backward", self.own[number], len(node.inputs), tuple(read), given_out, captors)
            found[number] = self.table.number(key)
        return found


def input_labels(before: Graph, after: Graph) -> tuple[list[Hashable], list[Hashable]]:
    """What the inputs of two graphs are called: their names where both have the same, else their places."""
    names = [value.name for value in before.inputs], [value.name for value in after.inputs]
    if set(names[0]) & set(names[1]):
        return list(names[0]), list(names[1])
    return list(range(len(names[0]))), list(range(len(names[1])))
