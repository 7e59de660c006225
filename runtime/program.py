"""A graph as the text of three Python functions, by what their values depend on.

`fixed()` computes what depends on constants alone, once; `sized(s0, s1, ...)` what depends on sizes, once for each
combination of them: dims, shapes, positions and masks without padding; `run(x0, x1, ..., sized)` the rest, at every step.
Names are counted, numbers are written by repr, and everything else is a global of the functions: no text of the model is
part of theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor

from fuser import dims
from fuser.canonicalize.rules import IMPURE
from fuser.constants import Constant
from fuser.content import content
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.errors import FuserError, UnsupportedOperator
from fuser.fused import REGISTRY
from fuser.graph import FUSER, Graph, Node, Value, mentioned
from fuser.operators.table import bind, row_of
from fuser.runtime.direct import DIRECT
from fuser.runtime.sizes import expression

Kernel = Callable[..., Any]
OWN_NOTATION = frozenset({"Rsqrt", "Dims"})


class Level(IntEnum):
    """What a value depends on."""

    FIXED = 0
    SIZED = 1
    RUN = 2


@dataclass
class Program:
    """Functions in text: what they are compiled with, and how they are called."""

    text: str
    names: dict[str, Any]  # the functions' globals
    fixed: list[str]  # the globals that `fixed` gives
    symbols: list[sympy.Symbol]  # whose sizes are the arguments of `sized`, in order
    nodes: dict[int, Node]  # by the line they are computed in


@dataclass
class _Line:
    text: str
    makes: list[str]
    reads: list[str]
    node: Node | None = None


@dataclass
class _Name:
    text: str
    level: Level


def label(node: Node) -> str:
    """An operator and which node it is, as errors name them."""
    name = node.name or next(iter(node.origin.sources), "") or next((v.name for v in node.outputs if v.name), "")
    return f"{node.domain + '.' if node.domain else ''}{node.op} (node '{name}')"


def check_operators(graph: Graph) -> None:
    """Refuses a graph with nodes that cannot be computed.

    Raises:
        UnsupportedOperator: naming the operators and, of each, the first node.
    """
    missing: dict[tuple[str, str], str] = {}
    for node in graph.nodes:
        if node.carried or node.captures:
            what = ", ".join(attribute.name for attribute in node.carried) or "values it captures"
            raise UnsupportedOperator(f"{label(node)}: control flow is not run, and neither is what it carries: {what}")
        known = node.op in OWN_NOTATION or node.op in REGISTRY
        if not (known if node.domain == FUSER else row_of(node.op, node.domain) is not None):
            missing.setdefault((node.domain, node.op), label(node))
    if missing:
        raise UnsupportedOperator(f"no operator of the table computes {', '.join(missing.values())}")


def one(result: Any) -> Any:
    """The first output of a function that may give several."""
    return result[0] if isinstance(result, (tuple, list)) else result


def several(result: Any, count: int) -> Sequence[Any]:
    """`count` outputs of a function that may give more, or fewer: those it does not have are None."""
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    return (results + [None] * count)[:count]


def write(
    graph: Graph, kernels: Mapping[str, Kernel], load: Callable[[Constant], Tensor], device: torch.device
) -> Program:
    """The program of a graph whose types and shapes are inferred.

    Args:
        graph: only nodes that `check_operators` accepts.
        kernels: what computes the fused operators; the reference function where there is none.
        load: gives a constant as a tensor on the device.
        device: where tensors that are no inputs are made.
    """
    return _Writer(graph, kernels, load, device).program()


@dataclass(eq=False)
class _Writer:
    graph: Graph
    kernels: Mapping[str, Kernel]
    load: Callable[[Constant], Tensor]
    device: torch.device
    lines: dict[Level, list[_Line]] = field(default_factory=lambda: {level: [] for level in Level})

    def __post_init__(self) -> None:
        self.opset = self.graph.opset
        self.globals: dict[str, Any] = {
            "torch": torch, "one": one, "several": several, "device": self.device, "host": torch.device("cpu"),
        }  # fmt: skip
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.levels: dict[int, Level] = {}  # of values
        self.names: dict[int, _Name] = {}  # of values
        self.symbols: dict[sympy.Symbol, _Name] = {}
        self.known: dict[Any, _Name] = {}  # of shapes, dims, contents and bound items
        self.exported: dict[Level, dict[str, None]] = {Level.FIXED: {}, Level.SIZED: {}}
        self.level = Level.RUN
        self.node: Node | None = None
        self.reads: list[str] = []
        self.count = 0

    def program(self) -> Program:
        graph = self.graph
        for index, value in enumerate(graph.inputs):
            self.levels[id(value)] = Level.RUN
            self.names[id(value)] = _Name(f"x{index}", Level.RUN)
            for dim in value.shape or ():
                if not isinstance(dim, int) and dim.is_Symbol and dim not in self.symbols:
                    self.symbols[dim] = _Name(f"s{len(self.symbols)}", Level.SIZED)
        symbols = list(self.symbols)
        needed = self._needed()
        for value in graph.inputs:
            self._measure(value)
        for node in graph.nodes:
            if node in needed:
                try:
                    self._write(node)
                except FuserError as error:
                    raise type(error)(f"{label(node)}: {error}") from error
        self.level, self.node, self.reads = Level.RUN, None, []
        results = ", ".join(self._result(value) for value in graph.outputs)
        self.lines[Level.RUN].append(_Line(f"return [{results}]", [], self.reads))
        return self._assemble(symbols)

    # What is computed

    def _sources(self, node: Node) -> list[Value]:
        """The values whose sizes a node's attributes mention and no input tells."""
        found = [self.graph.dim_sources[symbol][0] for symbol in mentioned(node) if symbol not in self.symbols]
        return [value for value in found if value.producer is not node]

    def _content(self, value: Value) -> Any:
        """What an integer tensor holds, where the sizes it is made of are known before it."""
        found = content(value)
        if found is None or value.dtype is None or not (value.dtype.is_integer or value.dtype is DType.BOOL):
            return None
        items = found if isinstance(found, tuple) else (found,)
        if not all(isinstance(item, (bool, int, sympy.Expr)) for item in items):
            return None
        if any(isinstance(item, sympy.Expr) and not item.is_integer for item in items):
            return None
        before = len(self.order) if value.producer is None else self.order[value.producer]
        for symbol in dims.symbols([item for item in items if isinstance(item, sympy.Expr)]):
            if symbol in self.symbols:
                continue
            source = self.graph.dim_sources.get(symbol)
            if source is None:
                return None
            maker = source[0].producer
            if maker is not None and self.order.get(maker, before) >= before:
                return None
        return found

    def _needed(self) -> set[Node]:
        """The nodes the outputs depend on, those aside whose results are known from sizes."""
        found: set[Node] = set()
        pending = list(self.graph.outputs)
        seen: set[int] = set()
        self.wanted: set[sympy.Symbol] = set()  # whose sizes are read
        while pending:
            value = pending.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            known = None if value.constant is not None else self._content(value)
            if known is not None:
                items = known if isinstance(known, tuple) else (known,)
                symbols = dims.symbols([item for item in items if isinstance(item, sympy.Expr)])
                self.wanted |= symbols
                pending += [self.graph.dim_sources[symbol][0] for symbol in symbols if symbol not in self.symbols]
            elif value.producer is not None and value.producer not in found:
                node = value.producer
                found.add(node)
                self.wanted.update(mentioned(node))
                pending += [v for v in node.inputs if v is not None] + self._sources(node)
        return found

    def _level_of(self, value: Value) -> Level:
        if value.constant is not None:
            return Level.FIXED
        known = self._content(value)
        if known is None:
            return self.levels[id(value)]
        return self._level_of_dims(known if isinstance(known, tuple) else (known,))

    def _level_of_dims(self, items: Sequence[Any]) -> Level:
        symbols = dims.symbols([item for item in items if isinstance(item, sympy.Expr)])
        return max((self._symbol(symbol).level for symbol in symbols), default=Level.FIXED)

    # How it is written

    def _write(self, node: Node) -> None:
        own = [symbol for symbol in mentioned(node) if self._measured_by(node, symbol)]
        levels = [self._level_of(value) for value in node.inputs if value is not None]
        levels += [self._symbol(symbol).level for symbol in mentioned(node) if symbol not in own]
        level = Level.RUN if node.op in IMPURE else max(levels, default=Level.FIXED)
        self.level, self.node, self.reads = level, node, []
        text = self._call(node)
        made = [self._fresh("v") for _ in node.outputs]
        for value, name in zip(node.outputs, made, strict=True):
            self.levels[id(value)] = level
            self.names[id(value)] = _Name(name, level)
        self._line(f"{', '.join(made)} = {text}", made)
        for value in node.outputs:
            self._measure(value)

    def _line(self, text: str, makes: list[str]) -> None:
        self.lines[self.level].append(_Line(text, makes, self.reads, self.node))
        self.reads = []

    def _measure(self, value: Value) -> None:
        """Reads the sizes that only this value tells."""
        if not value.defines:
            return
        for symbol, (source, axis) in self.graph.dim_sources.items():
            if source is value and symbol in self.wanted and symbol not in self.symbols:
                self.level, self.reads = self.levels[id(value)], []
                self.symbols[symbol] = _Name(name := self._fresh("s"), self.level)
                self._line(f"{name} = {self._use(self.names[id(value)])}.shape[{axis}]", [name])

    def _measured_by(self, node: Node, symbol: sympy.Symbol) -> bool:
        source = self.graph.dim_sources.get(symbol)
        return symbol not in self.symbols and source is not None and source[0].producer is node

    def _symbol(self, symbol: sympy.Symbol) -> _Name:
        if symbol not in self.symbols:
            source, axis = self.graph.dim_sources[symbol]
            assert source.constant is not None, f"the size {symbol} is read before {source} is made"
            self.symbols[symbol] = _Name(str(source.constant.shape[axis]), Level.FIXED)
        return self.symbols[symbol]

    def _call(self, node: Node) -> str:
        if (node.domain, node.op) in DIRECT:
            before = list(self.reads)
            text = DIRECT[node.domain, node.op](self, node)
            if text is not None:
                return text
            self.reads = before
        if node.is_a("Dims", FUSER):
            return self._tensor(node.attributes["dims"], DType.INT64, "host")
        operands: list[str]
        if node.domain == FUSER:
            operator = REGISTRY[node.op]
            compute, whole = self.kernels.get(node.op, operator.reference), frozenset[str]()
            arguments: list[Any] = list(node.inputs)
            keywords = dict(node.attributes)
            names: Sequence[str] = ()
        else:
            row = row_of(node.op, node.domain)
            assert row is not None
            compute, whole, names = row.compute, row.whole, row.inputs
            given = {name: self._own_dims(node, item) for name, item in node.attributes.items()}
            if node.op == "Reshape" and given.get("shape") is not None:
                given["allowzero"] = 1  # a size that is known stands for itself, 0 too
            arguments, keywords = bind(row, node.op, given, node.inputs)
            facts: dict[str, Any] = {"outputs": len(node.outputs), "opset": self.opset, "float_dtype": None}
            keywords |= {fact: facts[fact] for fact in row.context}
        operands = []
        for index, argument in enumerate(arguments):
            if not isinstance(argument, Value):
                operands.append("None" if argument is None else self._literal(argument))
                continue
            known = self._content(argument) if index < len(names) and names[index] in whole else None
            operands.append(self.read(argument) if known is None else self._literal(known))
        while operands and operands[-1] == "None":
            operands.pop()
        symbolic = {name: item for name, item in keywords.items() if _is_symbolic(item)}
        plain = {name: self._plain(item) for name, item in keywords.items() if name not in symbolic}
        function = self.bound(partial(compute, **plain) if plain else compute, node.op)
        call = f"{function}({', '.join([*operands, *(f'{k}={self._literal(v)}' for k, v in symbolic.items())])})"
        count = len(node.outputs)
        return f"one({call})" if count == 1 else f"several({call}, {count})"

    def _own_dims(self, node: Node, item: Any) -> Any:
        """A shape with -1 for what only the node's own output tells."""
        if not isinstance(item, tuple) or not any(self.is_own(node, dim) for dim in item):
            return item
        return tuple(-1 if self.is_own(node, dim) else dim for dim in item)

    def is_own(self, node: Node, dim: Any) -> bool:
        """Whether a dim is known only from the node's own output."""
        return isinstance(dim, sympy.Expr) and any(self._measured_by(node, symbol) for symbol in dim.free_symbols)

    def _plain(self, item: Any) -> Any:
        if isinstance(item, Constant):
            return self.load(item)
        return list(item) if isinstance(item, tuple) else item

    def _literal(self, item: Any) -> str:
        """The text of a parameter: dims, numbers, or what has to be bound."""
        if isinstance(item, tuple) and all(isinstance(part, (int, sympy.Expr)) for part in item):
            return self.shape(item)
        if isinstance(item, (int, sympy.Expr)) and not isinstance(item, bool):
            return self.dim(item)
        return self.bound(self._plain(item), "attribute")

    # Names

    def _fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def bound(self, item: Any, stem: str) -> str:
        """A global that holds `item`; `stem` is ours, an operator's name for instance."""
        name = self._fresh(f"{stem}_")
        self.globals[name] = item
        return name

    def _use(self, name: _Name) -> str:
        """A name, in the function that is being written: what another made is handed on to it."""
        if name.level is self.level:
            self.reads.append(name.text)
        elif not name.text.isdecimal():
            self.exported[name.level][name.text] = None
            if name.level is Level.SIZED:
                self.reads.append(name.text)
        return name.text

    def read(self, value: Value) -> str:
        """The name of a value's tensor."""
        if value.constant is not None:
            key = ("constant", value.constant.key)
            if key not in self.known:
                self.known[key] = _Name(self.bound(self.load(value.constant), "w"), Level.FIXED)
            return self.known[key].text
        known = self._content(value)
        if known is not None and value.dtype is not None:
            of_sizes = value.producer is not None and value.producer.is_a("Dims", FUSER)
            here = self.node is not None and self.node.domain == FUSER and of_sizes
            return self._shared(
                ("content", known, value.dtype, here),
                known,
                partial(self._tensor, known, value.dtype, "host" if here else "device"),
            )
        return self._use(self.names[id(value)])

    def _tensor(self, items: Any, dtype: DType, where: str) -> str:
        return f"torch.tensor({self._written(items)}, dtype=torch.{dtype}, device={where})"

    def _written(self, items: Any) -> str:
        if isinstance(items, tuple):
            return "(" + "".join(f"{self._written(item)}, " for item in items).rstrip() + ")"
        if isinstance(items, bool):
            return repr(items)
        return expression(items, lambda symbol: self._use(self._symbol(symbol)))

    def shape(self, shape: Shape) -> str:
        """The text of a tuple of dims; what depends on the inputs' sizes alone is computed with them."""
        return self._shared(("dims", shape), shape, partial(self._written, shape))

    def dim(self, dim: Dim) -> str:
        """The text of one dim."""
        return self._shared(("dim", dim), dim, partial(self._written, dim))

    def _shared(self, key: Any, items: Any, text: Callable[[], str]) -> str:
        """What is made of dims: once in the function of its level, and inline where that is the one being written."""
        listed = items if isinstance(items, tuple) else (items,)
        level = self._level_of_dims(listed)
        is_tensor = key[0] == "content"
        if level is Level.FIXED and not is_tensor:
            return text()
        if level is Level.RUN or (level is self.level and not is_tensor):
            return text()
        if key not in self.known:
            outer, reads = self.level, self.reads
            self.level, self.reads = level, []
            node, self.node = self.node, None
            name = self._fresh("c" if is_tensor else "d")
            self._line(f"{name} = {text()}", [name])
            self.level, self.reads, self.node = outer, reads, node
            self.known[key] = _Name(name, level)
        return self._use(self.known[key])

    def _result(self, value: Value) -> str:
        """An output; what is kept for later steps goes out as a copy."""
        text = self.read(value)
        return text if self._level_of(value) is Level.RUN else f"{text}.clone()"

    # The text

    def _assemble(self, symbols: list[sympy.Symbol]) -> Program:
        text: list[str] = []
        nodes: dict[int, Node] = {}

        def function(head: str, lines: list[_Line]) -> None:
            text.append(head)
            for line in lines:
                text.append(f"    {line.text}")
                if line.node is not None:
                    nodes[len(text)] = line.node
            text.extend(("", ""))

        sized = [self.symbols[symbol].text for symbol in symbols]
        fixed_names, handed = list(self.exported[Level.FIXED]), list(self.exported[Level.SIZED])
        arguments = [f"x{index}" for index in range(len(self.graph.inputs))]
        body = self.lines[Level.RUN]
        if handed:
            body = [_Line(f"{_tuple(handed)} = sized", handed, []), *body]
        function("def fixed():", [*self.lines[Level.FIXED], _Line(f"return {_tuple(fixed_names)}", [], [])])
        function(
            f"def sized({', '.join(sized)}):", [*self.lines[Level.SIZED], _Line(f"return {_tuple(handed)}", [], [])]
        )
        function(f"def run({', '.join([*arguments, 'sized'])}):", _dying(body))
        return Program("\n".join(text).rstrip() + "\n", self.globals, fixed_names, symbols, nodes)


def _tuple(names: Sequence[str]) -> str:
    return "(" + "".join(f"{name}, " for name in names).rstrip() + ")"


def _is_symbolic(item: Any) -> bool:
    return any(isinstance(part, sympy.Expr) for part in (item if isinstance(item, tuple) else (item,)))


def _dying(lines: list[_Line]) -> list[_Line]:
    """The lines, each followed by the deletion of what is read no more: buffers are free as soon as they can be."""
    last: dict[str, int] = {}
    for place, line in enumerate(lines):
        last.update(dict.fromkeys(line.makes, place))
        last.update(dict.fromkeys(line.reads, place))
    made = {name for line in lines for name in line.makes}
    found: list[_Line] = []
    for place, line in enumerate(lines):
        found.append(line)
        dead = [name for name in dict.fromkeys((*line.makes, *line.reads)) if last[name] == place and name in made]
        if dead and place < len(lines) - 1:
            found.append(_Line(f"del {', '.join(dead)}", [], []))
    return found


__all__ = ["Level", "Program", "check_operators", "label", "write"]
