"""The language patterns are written in: ordinary expressions over `op`, `either` and `maybe`, traced once.

    def source(x, weight, eps):
        h = maybe(op.Cast(x))
        return maybe(op.Cast(h * op.Rsqrt(op.ReduceMean(h * h, axes=(-1,)) + eps))) * weight

Parameters are variables: they match any value, the same one wherever they stand. Numbers match constants equal to
them. What is written once and used twice is one node.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuser.graph import FUSER, MICROSOFT, Node, Value

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Max", "Min", "Sum"})


class Pattern:
    """Something a value can match."""

    def __add__(self, other: Any) -> "Pattern":
        return _binary("Add", self, other)

    def __radd__(self, other: Any) -> "Pattern":
        return _binary("Add", other, self)

    def __sub__(self, other: Any) -> "Pattern":
        return _binary("Sub", self, other)

    def __rsub__(self, other: Any) -> "Pattern":
        return _binary("Sub", other, self)

    def __mul__(self, other: Any) -> "Pattern":
        return _binary("Mul", self, other)

    def __rmul__(self, other: Any) -> "Pattern":
        return _binary("Mul", other, self)

    def __truediv__(self, other: Any) -> "Pattern":
        return _binary("Div", self, other)

    def __rtruediv__(self, other: Any) -> "Pattern":
        return _binary("Div", other, self)

    def __matmul__(self, other: Any) -> "Pattern":
        return _binary("MatMul", self, other)

    def __neg__(self) -> "Pattern":
        return Result(Apply("Neg", "", (self,), {}, caller()))


@dataclass(eq=False, frozen=True)
class Var(Pattern):
    """Any value; the same one at every occurrence of the name."""

    name: str
    scalar: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False, frozen=True)
class Literal(Pattern):
    """A constant all of whose elements equal a number, as far as the constant's own precision can say."""

    number: float

    def accepts(self, value: Value) -> bool:
        if value.constant is None or value.scalar is None:
            return False
        digits = {"float16": 1e-3, "bfloat16": 8e-3}.get(str(value.dtype), 1e-6)
        return math.isclose(value.scalar, self.number, rel_tol=digits)

    def __str__(self) -> str:
        return f"{self.number:g}"


@dataclass(eq=False, frozen=True)
class Capture:
    """An attribute of any value, kept under a name."""

    name: str


@dataclass(eq=False)
class Apply:
    """A node of the pattern."""

    op: str
    domain: str
    inputs: tuple[Pattern | None, ...]
    attributes: dict[str, Any]
    line: str
    outputs: int = 1
    kept: bool = False  # matched and checked with the rest, but not replaced
    beyond: bool = False  # matched behind the outputs, to find what belongs together

    def __str__(self) -> str:
        inputs = [_brief(p) for p in self.inputs]
        inputs += [f"{k}={v}" for k, v in self.attributes.items() if not isinstance(v, Capture)]
        return f"{self.op}({', '.join(inputs)})"


def _brief(pattern: Pattern | None) -> str:
    if isinstance(pattern, Result):
        return pattern.node.op
    if isinstance(pattern, Either):
        return _brief(pattern.alternatives[0])
    return "-" if pattern is None else str(pattern)


@dataclass(eq=False)
class Result(Pattern):
    """One output of a node of the pattern."""

    node: Apply
    index: int = 0

    def __iter__(self) -> Iterator["Result"]:
        raise TypeError(f"{self.node.op} is one output; ask for more with outputs=n")


@dataclass(eq=False)
class Either(Pattern):
    """The first alternative that leads to a match; all of them are tried."""

    alternatives: tuple[Pattern, ...]


@dataclass(eq=False)
class Absent(Pattern):
    """An optional input: missing, or matching `present`."""

    present: Pattern

    def __str__(self) -> str:
        return f"[{self.present}]"


def _pattern(x: Any) -> Pattern | None:
    if x is None or isinstance(x, Pattern):
        return x
    return Literal(float(x))


def _binary(name: str, a: Any, b: Any) -> "Pattern":
    return Result(Apply(name, "", (_pattern(a), _pattern(b)), {}, caller()))


def _apply(
    name: str, inputs: Sequence[Any], attributes: dict[str, Any] | None = None, domain: str = "", outputs: int = 1
) -> Any:
    node = Apply(name, domain, tuple(_pattern(x) for x in inputs), attributes or {}, caller(), outputs)
    return Result(node) if outputs == 1 else tuple(Result(node, i) for i in range(outputs))


def caller() -> str:
    """`folder/file.py:line` of the pattern's author."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, "fuser.fused"):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"


class _Namespace:
    """`op.Name(...)` for one operator domain."""

    def __init__(self, domain: str) -> None:
        self._domain = domain

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def make(*inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
            domain = FUSER if name in ("Rsqrt", "Dims") else self._domain
            return _apply(name, inputs, attributes, domain, outputs)

        return make


class _Ops(_Namespace):
    microsoft = _Namespace(MICROSOFT)


op = _Ops("")


def either(*alternatives: Any) -> Pattern:
    """Any of several forms, preferred in the order given."""
    return Either(tuple(p for x in alternatives if (p := _pattern(x)) is not None))


def maybe(pattern: Any) -> Pattern:
    """A node that may be left out: `pattern`, or its first input."""
    if not isinstance(pattern, Result) or pattern.node.inputs[0] is None:
        raise TypeError("maybe() takes a node with a first input")
    return Either((pattern, pattern.node.inputs[0]))


def keep(pattern: Any) -> Any:
    """A node others may share: it is part of the match and of the check, and stays in the graph."""
    if not isinstance(pattern, Result):
        raise TypeError("keep() takes a node")
    pattern.node.kept = True
    return pattern


@dataclass(eq=False, frozen=True)
class Joined:
    """Outputs that belong together because of what reads them."""

    outputs: tuple[Pattern, ...]
    by: Result


def joined(*outputs: Any, by: Any) -> Joined:
    """The outputs of a source that meet in a node behind it, which is no part of the match."""
    if not isinstance(by, Result) or not all(isinstance(output, Pattern) for output in outputs):
        raise TypeError("joined() takes outputs and the node that reads them")
    by.node.beyond = True
    return Joined(outputs, by)


def number(name: str) -> Pattern:
    """A variable for a constant that is one number."""
    return Var(name, scalar=True)


def optional(pattern: Pattern) -> Pattern:
    """An input that may be absent."""
    return Absent(pattern)


def capture(name: str) -> Any:
    """Any value of an attribute, to be read as `m.attributes[name]`."""
    return Capture(name)


class CheckFailed(Exception):
    """A complete match that a `require` refused; `place` is the value to look at."""

    def __init__(self, reason: str, place: Value | None = None) -> None:
        super().__init__(reason)
        self.place = place


class NotThis(Exception):
    """A complete match that is something else altogether: no near miss."""


def require(condition: object, reason: str, place: Value | None = None) -> None:
    """Refuses a match, and says why: the near miss is reported."""
    if not condition:
        raise CheckFailed(reason, place)


def applies(condition: object) -> None:
    """Refuses a match silently: what was found is not the construct at all."""
    if not condition:
        raise NotThis


@dataclass
class Match:
    """A place where a source matched: what each variable, each attribute and each node of the pattern is."""

    values: dict[str, Value | None]
    attributes: dict[str, Any]
    nodes: dict[int, Node]
    outputs: tuple[Value, ...]
    kept: frozenset[Node] = frozenset()
    beyond: frozenset[Node] = frozenset()

    def __getattr__(self, name: str) -> Any:
        """The value a variable matched; None where its alternative was not taken."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self.values.get(name)

    @property
    def region(self) -> list[Node]:
        """The nodes the match replaces, in order."""
        return sorted(set(self.nodes.values()) - self.kept - self.beyond, key=lambda node: node.place or 0.0)

    @property
    def context(self) -> list[Node]:
        """The nodes the match relies on and leaves, in order."""
        return sorted(self.kept, key=lambda node: node.place or 0.0)

    def scalar(self, name: str) -> float:
        """The number a variable's constant holds; refuses the match where it is not one number."""
        value = self.values.get(name)
        number = None if value is None else value.scalar
        if number is None:
            raise CheckFailed(f"{name} must be a scalar constant", value)
        return number
