"""The table of ATen operators: what each one is in the graph's vocabulary, one small function an operator.

A row is a function from the operator's arguments to values. Tensors arrive as values, sizes as dims, the rest as it is;
`at` is the place in the graph: it emits nodes and knows the dtype and shape of the result.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
import sympy
import torch

from fuser.constants import Array, Constant
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.errors import UnsupportedOperator
from fuser.fx.sizes import Sizes
from fuser.graph import FUSER, Graph, Node, Origin, Value
from fuser.shapes import infer_node

Result: TypeAlias = Value | Sequence[Value]
Number: TypeAlias = int | float | bool | sympy.Expr
Row: TypeAlias = Callable[..., Result]
AnyRow = TypeVar("AnyRow", bound=Row)

ROWS: dict[str, Row] = {}
KEYWORDS: dict[str, frozenset[str] | None] = {}  # what a row may be told by name; None where it does not matter
# Where and how elements lie in memory is nothing that a graph says.
PLACEMENT = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})


def aten(*names: str, namespace: str = "aten") -> Callable[[AnyRow], AnyRow]:
    """Enters the decorated function under operators of ATen, `add.Tensor` say; parameters as in their schema."""

    def enter(row: AnyRow) -> AnyRow:
        parameters = inspect.signature(row).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in names:
            ROWS[f"{namespace}.{name}"] = row
            KEYWORDS[f"{namespace}.{name}"] = None if anything else frozenset(parameters)
        return row

    return enter


@cache
def dtype_of(dtype: torch.dtype) -> DType:
    """Our element type for torch's.

    Raises:
        UnsupportedOperator: there is none.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DType.__members__.values():
        raise UnsupportedOperator(f"tensors of {name} are not supported")
    return DType(name)


@cache
def _promoted(*operands: tuple[Any, bool]) -> DType:
    """torch's promotion of two operands, each (a DType and whether it has dims, or a Python type)."""
    samples = [
        torch.empty((1,) if kind else (), dtype=what.torch, device="meta") if isinstance(what, DType) else what(1)
        for what, kind in operands
    ]
    return dtype_of(torch.result_type(*samples))


class At:
    """One node of the program, on its way into the graph."""

    def __init__(self, graph: Graph, sizes: Sizes, constants: dict[Any, Value]) -> None:
        self.graph, self.sizes, self.constants = graph, sizes, constants
        self.result: Any = None
        self.name = ""
        self.origin = Origin()
        self._last: Node | None = None

    def enter(self, name: str, origin: Origin, result: Any) -> None:
        """What is emitted from now on stands for another node of the program, which gives `result` (fake tensors)."""
        self.name, self.origin, self.result, self._last = name, origin, result, None

    def leave(self, outcome: Result) -> None:
        """Gives what was made for this node its names, and the dtypes and shapes that the program states."""
        made = [outcome] if isinstance(outcome, Value) else list(outcome)
        results = [self.result] if isinstance(outcome, Value) else list(self.result)
        last = self._last.outputs if self._last is not None else []
        if not any(value in last for value in made):
            self.settle()
        for index, (value, result) in enumerate(zip(made, results, strict=True)):
            if value.producer is None or not value.name.startswith(f"{self.name}."):
                continue  # what was there before
            self.graph.names.discard(value.name)
            value.name = self.graph.fresh_name(self.name if len(made) == 1 else f"{self.name}_{index}")
            if result is not None:
                value.dtype, value.shape = dtype_of(result.dtype), self.sizes.shape(result.shape)
                for axis, dim in enumerate(value.shape):
                    if isinstance(dim, sympy.Symbol) and dim not in self.graph.dim_sources:
                        self.graph.define(dim, value, axis)

    @property
    def dtype(self) -> DType:
        """The result's element type."""
        return dtype_of(self.result.dtype)

    @property
    def shape(self) -> Shape:
        """The result's shape."""
        return self.sizes.shape(self.result.shape)

    def settle(self) -> None:
        """Infers what was emitted last, where something still asks for its dtype or shape."""
        if self._last is not None:
            infer_node(self.graph, self._last)
            self._last = None

    def op(self, op: str, *inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
        """The output of a new node."""
        return self.ops(op, 1, *inputs, domain=domain, **attributes)[0]

    def ops(self, op: str, outputs: int, *inputs: Value | None, domain: str = "", **attributes: Any) -> list[Value]:
        """The outputs of a new node that has several."""
        self.settle()
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        stems = [f"{self.name}.{op.lower()}"] * outputs
        for attribute in attributes.values():
            self.check(attribute if isinstance(attribute, tuple) else (attribute,))
        node = self.graph.add(op, given, attributes, domain=domain, outputs=stems)
        node.name, node.origin = self.name, self.origin
        self._last = node
        return node.outputs

    def check(self, sizes: Iterable[Any]) -> None:
        """Refuses dims that no tensor has as its size: they depend on what a tensor holds."""
        for size in sizes:
            if isinstance(size, sympy.Expr):
                for symbol in size.free_symbols:
                    if symbol not in self.graph.dim_sources:
                        raise UnsupportedOperator(f"the size {symbol} depends on what a tensor holds")

    def constant(self, data: Any, dtype: DType) -> Value:
        """A constant of the numbers in `data`."""
        key = (repr(data), dtype)
        if key not in self.constants:
            with np.errstate(over="ignore"):  # a number beyond the type's range is infinite
                array = Array.of(data, dtype)
            self.constants[key] = self.graph.constant(array, f"{self.name}.constant")
        return self.constants[key]

    def filled(self, number: Any, dtype: DType, shape: tuple[int, ...]) -> Value:
        """A constant of one number in every element."""
        return self.constant(np.full(shape, number).tolist(), dtype)

    def full(self, number: Number, dtype: DType, shape: Shape) -> Value:
        """A number, or a size, in every element of a shape."""
        if not shape:
            return self.scalar(number, dtype)
        if isinstance(number, (int, float)):
            return self.op("ConstantOfShape", shape=shape, value=Array.of([number], dtype))
        return self.op("Expand", self.scalar(number, dtype), shape=shape)

    def held(self, constant: Constant, stem: str) -> Value:
        """A constant that is there already: a weight, or one seen in another way. One value for each."""
        key = (stem, constant.key)
        if key not in self.constants:
            self.constants[key] = self.graph.constant(constant, stem)
        return self.constants[key]

    def vector(self, sizes: Sequence[Dim]) -> Value:
        """An int64 vector of dims."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes), DType.INT64)
        return self.op("Dims", domain=FUSER, dims=tuple(sizes))

    def scalar(self, number: Number, dtype: DType) -> Value:
        """A Python number, or a size, as a tensor without dims."""
        if isinstance(number, sympy.Expr):
            return self.cast(self.op("Dims", domain=FUSER, dims=number), dtype)
        return self.constant(number, dtype)

    def operand(self, x: Value | Number, dtype: DType) -> Value:
        """A tensor or a number, of a given type."""
        return self.cast(x, dtype) if isinstance(x, Value) else self.scalar(x, dtype)

    def cast(self, x: Value, dtype: DType) -> Value:
        """`x` as another type; itself where it is of that type."""
        if x.dtype is None:
            self.settle()
        return x if x.dtype is dtype else self.op("Cast", x, to=dtype.onnx)

    def promoted(self, *operands: Value | Number) -> DType:
        """The type that torch computes with, of operands of several."""
        kinds: list[tuple[Any, bool]] = []
        for operand in operands:
            if isinstance(operand, Value):
                assert operand.dtype is not None and operand.shape is not None
                kinds.append((operand.dtype, bool(operand.shape)))
            else:
                kinds.append((int if isinstance(operand, sympy.Expr) else type(operand), False))
        return _promoted(*kinds)


def rank(x: Value) -> int:
    assert x.shape is not None, f"the rank of {x} is stated by the program"
    return len(x.shape)


def back(axis: int, rank: int) -> int:
    """An axis counted from the back."""
    return axis - rank if axis >= 0 else axis


def axes_of(axes: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Axes counted from the back; all where none are given."""
    if axes is None:
        return tuple(range(-rank, 0))
    chosen = (axes,) if isinstance(axes, int) else tuple(axes)
    return tuple(back(axis, rank) for axis in chosen) or tuple(range(-rank, 0))
