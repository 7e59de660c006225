"""Recognising a tensor by what it holds: its subgraph, evaluated on many instances, compared with a closed form.

Masks and rotary tables depend on sizes, on positions and on which tokens are padding, and on nothing else. How
an exporter computes them changes with every release; what they hold does not. A fused operator may declare a recognizer,
which is shown every such *positional* value that meets the rest of the model, and says what closed form it is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from fuser import dims, operators
from fuser.canonicalize.rules import IMPURE
from fuser.constants import Array, Constant
from fuser.dims import Dim
from fuser.dtypes import DType
from fuser.errors import FuserError
from fuser.evaluation import evaluate
from fuser.fused import FusedOp
from fuser.graph import FUSER, Graph, Node, Origin, Value, mentioned
from fuser.shapes import infer_node
from fuser.tensors import to_tensor

NODE_LIMIT = 400  # a longer subgraph is none that an exporter writes for a mask or a table
TABLE_LIMIT = 1 << 24  # elements of a constant that is looked at
Symbols = Mapping[sympy.Symbol, int]


class Disagrees(Exception):
    """A value is not the closed form it was taken for; the text names the instance."""


@dataclass
class Subject:
    """A positional value: the nodes it is computed by, in order, from the graph's inputs and sizes."""

    graph: Graph
    value: Value
    nodes: list[Node]
    inputs: list[Value]

    @cached_property
    def constants(self) -> list[Constant]:
        """The constants that the subgraph reads."""
        return [v.constant for node in self.nodes for v in node.inputs if v is not None and v.constant is not None]

    @cached_property
    def numbers(self) -> list[int]:
        """The sizes greater than 1 of the numbers in the subgraph: lengths of windows among them.

        A number that masks scores is none, nor what stands for infinity among whole numbers.
        """
        found = {
            abs(int(constant.scalar))
            for constant in self.constants
            if constant.scalar is not None
            and abs(constant.scalar) < 1 << 30
            and (constant.dtype.is_integer or constant.scalar > 0)
        }
        return sorted(number for number in found if number > 1)

    @cached_property
    def extent(self) -> int | None:
        """As far as the tables reach that the subgraph stores; None where it computes everything."""
        long = [[size for size in constant.shape if size > 1] for constant in self.constants]
        return min((min(sizes[-2:]) for sizes in long if len(sizes) > 1), default=None)

    def after(self, start: Value) -> "Subject | None":
        """The part of the subgraph that computes the value from `start`; None where it reads anything else."""
        nodes = [] if start is self.value else _ancestors(self.value, {start})
        made = {id(start)} | {id(value) for node in nodes for value in node.outputs}
        read = [v for node in nodes for v in node.inputs if v is not None and v.constant is None and id(v) not in made]
        return None if read else Subject(self.graph, self.value, nodes, [start])

    def sizes(self, wanted: Sequence[tuple[Dim, int]], otherwise: int) -> dict[sympy.Symbol, int] | None:
        """Numbers for the symbols that make dims the sizes wanted; None where the graph does not allow them.

        Symbols that no dim mentions are `otherwise`.
        """
        found: dict[sympy.Symbol, int] = {}
        for last in (False, True):  # what one dim leaves open, another may tell
            for dim, size in wanted:
                unknown = [symbol for symbol in sorted(dims.symbols([dim]), key=str) if symbol not in found]
                if last and len(unknown) > 1:
                    found.update(dict.fromkeys(unknown[:-1], 1))
                    del unknown[:-1]
                if len(unknown) == 1:
                    answer = _solved(dims.substitute(dim, found), unknown[0], size)
                    if answer is None:
                        return None
                    found[unknown[0]] = answer
        if any(dims.substitute(dim, found) != size for dim, size in wanted):
            return None
        named = [dim for value in self.inputs for dim in value.shape or ()]
        named += [dim for node in self.nodes for value in node.outputs for dim in value.shape or ()]
        named += [symbol for node in self.nodes for symbol in mentioned(node)]
        for symbol in dims.symbols(named) - found.keys():
            if self._source(symbol) is None:
                found[symbol] = otherwise
        return found

    def makes(self, dim: Dim) -> bool:
        """Whether only the subgraph itself tells a dim."""
        return any(self._source(symbol) is not None for symbol in dims.symbols([dim]))

    def _source(self, symbol: sympy.Symbol) -> Node | None:
        """The node of the subgraph whose result tells a symbol's size."""
        source = self.graph.dim_sources.get(symbol)
        return source[0].producer if source is not None and source[0].producer in self.nodes else None

    def evaluate(self, sizes: Symbols, inputs: Mapping[Value, Tensor]) -> Tensor:
        """What the value holds, floating-point numbers in float64.

        Raises:
            Disagrees: the subgraph cannot be computed on this instance.
        """
        values: dict[int, Tensor | None] = {id(value): tensor for value, tensor in inputs.items()}
        symbols = dict(sizes)
        try:
            for node in self.nodes:
                given = [
                    None if v is None else _tensor(v) if v.constant is not None else values[id(v)] for v in node.inputs
                ]
                results = evaluate(node, given, symbols, opset=self.graph.opset, float_dtype=torch.float64)
                for value, result in zip(node.outputs, results, strict=False):
                    values[id(value)] = result
                    for dim, size in zip(value.shape or (), () if result is None else result.shape, strict=False):
                        if isinstance(dim, sympy.Symbol):
                            symbols.setdefault(dim, size)
        except (FuserError, RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Disagrees(f"it cannot be computed: {text}") from None
        found = values[id(self.value)]
        if found is None:
            raise Disagrees("it cannot be computed: the output is absent")
        return found


@dataclass(frozen=True)
class Refusal:
    """A positional value that looks like a closed form, and the instance on which it is not."""

    operator: str
    subject: Subject
    line: str
    expected: str
    found: str


@dataclass
class Recognition:
    """The positional values of a graph, and how to put closed forms in their places."""

    graph: Graph
    subjects: list[Subject]
    refusals: list[Refusal] = field(default_factory=list)

    def emit(
        self, op: str, subject: Subject, inputs: Sequence[Value | None], attributes: Mapping[str, Any] | None = None, *,
        domain: str = "", outputs: int = 1,
    ) -> Value:  # fmt: skip
        """The (first) output of a new node that stands for a subject's subgraph."""
        like = subject.value.producer
        assert like is not None
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = self.graph.add(op, given, attributes, domain=domain, outputs=[subject.value.name] * outputs, like=like)
        node.origin = Origin.union(part.origin for part in subject.nodes)
        infer_node(self.graph, node)
        return node.output

    def constant(self, data: Any, dtype: DType) -> Value:
        return self.graph.constant(Array.of(data, dtype))

    def refuse(self, operator: FusedOp, subject: Subject, expected: str, found: str) -> None:
        line = operator.recognizer_line
        self.refusals.append(Refusal(operator.name, subject, line, expected, found))


def recognize(graph: Graph, operators_: Sequence[FusedOp]) -> list[Refusal]:
    """Puts the closed forms of operators that have a recognizer in the places of what holds the same.

    The graph stays valid. Returns what was looked at closely and refused.
    """
    recognizing = [operator for operator in operators_ if operator.recognizer is not None]
    if not recognizing:
        return []
    recognition = Recognition(graph, list(subjects(graph)))
    for operator in recognizing:
        assert operator.recognizer is not None
        operator.recognizer(recognition)
    graph.prune()
    graph.sort()
    return recognition.refusals


def subjects(graph: Graph) -> Iterator[Subject]:
    """The positional values that other nodes read: depending on sizes, whole-number inputs and masks, not on activations."""
    positional: set[int] = {
        id(value)
        for value in graph.inputs
        if value.dtype is not None and value.rank is not None and (not value.dtype.is_float or value.rank <= 2)
    }
    accepted: dict[int, bool] = {}
    made: list[Value] = []
    for node in graph.nodes:
        if not _is_plain(node):
            continue
        given = [value for value in node.inputs if value is not None]
        if all(id(v) in positional or (v.constant is not None and _accepts(v.constant, accepted)) for v in given):
            positional.update(id(value) for value in node.outputs)
            made += node.outputs
    for value in made:
        if (
            value.dtype is None
            or value.shape is None
            or not value.shape
            or value.producer is None
            or value.producer.is_a("Dims", FUSER)
        ):
            continue
        if value.is_output or any(id(out) not in positional for user in value.consumers for out in user.outputs):
            subject = subject_of(graph, value)
            if subject is not None:
                yield subject


def subject_of(graph: Graph, value: Value) -> Subject | None:
    """A value with the nodes it is computed by; None where nothing computes it, or what cannot be evaluated, or too much."""
    nodes = _ancestors(value, set())
    if not 0 < len(nodes) <= NODE_LIMIT or not all(map(_is_plain, nodes)):
        return None
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
    return Subject(graph, value, nodes, [v for v in read if v.producer is None and v.constant is None])


def _is_plain(node: Node) -> bool:
    if node.op in IMPURE or node.carried or node.captures:
        return False
    return node.op in ("Dims", "Rsqrt") if node.domain == FUSER else operators.supported(node.op, node.domain)


def _accepts(constant: Constant, known: dict[int, bool]) -> bool:
    """Whether a constant may take part: no weight, but frequencies, a mask, or a table of sines."""
    if id(constant) not in known:
        long = [size for size in constant.shape if size > 1]
        known[id(constant)] = (
            not constant.dtype.is_float
            or len(long) <= 1
            or (
                constant.size <= TABLE_LIMIT and constant.is_known and (_starts_at_zero(constant) or _is_mask(constant))
            )
        )
    return known[id(constant)]


def _starts_at_zero(constant: Constant) -> bool:
    """Whether the first row holds sines and cosines of 0 alone: 0 and one other number."""
    row = to_tensor(constant.rows(0, 1)).double()
    while row.dim() > 1:
        row = row[0]
    others = row[row != 0]
    return others.numel() > 0 and bool((others == others[0]).all())


def _is_mask(constant: Constant) -> bool:
    shape = constant.shape
    return len(shape) > 1 and shape[-1] == shape[-2] and len(set(np.unique(constant.numpy()).tolist())) == 2


def _solved(dim: Dim, symbol: sympy.Symbol, size: int) -> int | None:
    """The number that makes a dim, linear in its one symbol, a size."""
    at_zero, at_one = (dims.substitute(dim, {symbol: number}) for number in (0, 1))
    if not isinstance(at_zero, int) or not isinstance(at_one, int) or at_one == at_zero:
        return None
    answer, rest = divmod(size - at_zero, at_one - at_zero)
    return answer if rest == 0 and answer >= 0 else None


def _ancestors(value: Value, stop: Iterable[Value]) -> list[Node]:
    """The nodes a value is computed by, in order, not going past `stop`."""
    stops = {id(v) for v in stop}
    found: dict[Node, None] = {}
    pending = [value]
    while pending:
        one = pending.pop()
        if id(one) in stops or one.producer is None or one.producer in found:
            continue
        found[one.producer] = None
        pending.extend(v for v in one.producer.inputs if v is not None)
    return sorted(found, key=lambda node: node.place or 0.0)


def _tensor(value: Value) -> Tensor:
    assert value.constant is not None
    tensor = to_tensor(value.constant.numpy())
    return tensor.double() if tensor.is_floating_point() else tensor
