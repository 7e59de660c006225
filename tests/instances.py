"""The source patterns of fused operators as plain graphs: every way a pattern can be written, built from the pattern.

A pattern is walked with one alternative chosen for each `either` and `maybe`; variables become graph inputs and constants of
the shapes that the operator's signature and example state, literals and captures become numbers. Casts have no type in a
pattern: of all types they may have, the first assignment that ONNX would accept is taken, in a float16 graph.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fuser import dims
from fuser.constants import Array
from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.evaluation import to_tensor
from fuser.fused import Argument, FusedOp, Source
from fuser.graph import FUSER, Graph, Node, Value
from fuser.pattern import Absent, Apply, Capture, Either, Literal, Pattern, Result, Var
from fuser.shapes import infer_node

Alternative = tuple[int, int]  # id of an Either (or Absent), and which of its forms
NEWEST = {"Swish": 24}
NUMERIC = frozenset({"Add", "Sub", "Mul", "Div", "MatMul"})


class IllTyped(Exception):
    """ONNX would not accept these types."""


@dataclass
class Instance:
    """One graph. `inputs` are the operator's own, by name, as the reference takes them."""

    operator: FusedOp
    source: Source
    example: dict[str, Any]
    graph: Graph
    inputs: dict[str, Value | list[Value]]
    taken: frozenset[Alternative]
    number: int = 0

    def __str__(self) -> str:
        dims_text = "x".join(str(n) for n in self.example["B"])
        return f"{self.operator.name}-{self.source.function.__name__}-{dims_text}-{self.number}"

    @property
    def dtype(self) -> DType:
        found = self.graph.inputs[0].dtype
        assert found is not None
        return found

    def feeds(self) -> dict[str, NDArray[Any]]:
        """Random graph inputs of the example's own sizes."""
        random = np.random.RandomState(1)
        symbols = {dims.symbol(f"B{i}"): size for i, size in enumerate(self.example["B"])}
        made = {}
        for value in self.graph.inputs:
            assert value.dtype is not None and value.shape is not None
            drawn = random.standard_normal(dims.concrete(value.shape, symbols))
            made[value.name] = np.asarray(drawn).astype(value.dtype.numpy)
        return made

    def reference(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """What the operator's reference function gives in float64."""
        arguments: list[torch.Tensor | None] = []
        for argument in self.operator.signature.inputs:
            given = self.inputs.get(argument.name)
            parts = given if isinstance(given, list) else [] if given is None else [given]
            tensors = [to_tensor(v.constant.numpy() if v.constant else feeds[v.name]).double() for v in parts]
            arguments.append(torch.cat(tensors, -1) if tensors else None)
        found = self.operator.evaluate(arguments, attributes_of(self.example))
        return [tensor.numpy() for tensor in found]


def attributes_of(example: dict[str, Any]) -> dict[str, Any]:
    """The operator's attributes in an example: what is no dim."""
    return {name: value for name, value in example.items() if name[0].islower() and name != "without"}


def shape_of(argument: Argument, example: dict[str, Any]) -> Shape:
    """An argument's shape in an example; leading dims are symbols `B0`, `B1` ..."""
    shape: list[dims.Dim] = []
    for name in argument.dims:
        lead = [dims.symbol(f"B{i}") for i in range(len(example["B"]))]
        shape.extend(lead if name.startswith("*") else [example[name]])
    return tuple(shape)


def instances(operator: FusedOp) -> Iterator[Instance]:
    """Instances of each source and example of an operator that together take every alternative."""
    for source in operator.sources:
        seen: set[Alternative] = set()
        for example in operator.example_sets:
            if not _fits(source, example):
                continue
            first = True
            for instance in variants(operator, source, example):
                if first or not instance.taken <= seen:
                    seen |= instance.taken
                    instance.number = len(seen)
                    first = False
                    yield instance


def alternatives(source: Source) -> set[Alternative]:
    """Everything there is to choose in a source."""
    return {(id(p), i) for p in _choices(source) for i in range(len(p.alternatives) if isinstance(p, Either) else 2)}


def _fits(source: Source, example: dict[str, Any]) -> bool:
    """Whether a source is of the form an example asks for."""
    names = {node.op for node in source.nodes}
    if example.get("activation", next(iter(names))) not in names:
        return False
    if "sizes" in example and len(example["sizes"]) != len(source.outputs):
        return False
    mandatory = set().union(*(_variables(p, optional=False) for p in source.outputs))
    possible = set().union(*(_variables(p, optional=True) for p in source.outputs))
    if any(name.startswith(("w0", "b0")) for name in possible):
        return True
    tensors = {argument.name for argument in source.operator.signature.inputs}
    given = tensors - set(example.get("without", ()))
    return mandatory & tensors <= given <= possible


def _variables(pattern: Pattern | None, optional: bool) -> set[str]:
    if isinstance(pattern, Var):
        return {pattern.name}
    if isinstance(pattern, Absent):
        return _variables(pattern.present, optional) if optional else set()
    if isinstance(pattern, Either):
        found = [_variables(p, optional) for p in pattern.alternatives]
        return set.union(*found) if optional else set.intersection(*found)
    if isinstance(pattern, Result):
        return set().union(*(_variables(p, optional) for p in pattern.node.inputs))
    return set()


def _choices(source: Source) -> list[Either | Absent]:
    found: dict[int, Either | Absent] = {}

    def visit(pattern: Pattern | None) -> None:
        if isinstance(pattern, Either):
            found[id(pattern)] = pattern
            for alternative in pattern.alternatives:
                visit(alternative)
        elif isinstance(pattern, Absent):
            found[id(pattern)] = pattern
            visit(pattern.present)
        elif isinstance(pattern, Result):
            for sub in pattern.node.inputs:
                visit(sub)

    for output in source.outputs:
        visit(output)
    return list(found.values())


def variants(operator: FusedOp, source: Source, example: dict[str, Any]) -> Iterator[Instance]:
    """The instances of one source and one example, one for each choice of alternatives that types allow."""
    choices = _choices(source)
    forms = [range(len(p.alternatives) if isinstance(p, Either) else 2) for p in choices]
    for picked in itertools.product(*forms):
        choice = {id(p): i for p, i in zip(choices, picked, strict=True)}
        for types in _types():
            builder = _Builder(operator, source, example, choice, types)
            try:
                yield builder.build()
                break
            except IllTyped:
                continue


@dataclass(frozen=True)
class _Types:
    x: DType
    weight: DType
    bias: DType
    casts: tuple[DType, ...] = ()


def _types() -> Iterator[_Types]:
    """The types to try: all float32; then float16 rows, with Casts to anything."""
    yield _Types(DType.FLOAT32, DType.FLOAT32, DType.FLOAT32)
    both = (DType.FLOAT16, DType.FLOAT32)
    for weight, bias in itertools.product(both, both):
        for casts in itertools.product(both[::-1], repeat=4):
            yield _Types(DType.FLOAT16, weight, bias, casts)


class _Builder:
    def __init__(
        self, operator: FusedOp, source: Source, example: dict[str, Any], choice: dict[int, int], types: _Types
    ) -> None:
        self.operator, self.source, self.example = operator, source, example
        self.choice, self.types, self.casts = choice, types, list(types.casts)
        opset = max((NEWEST.get(node.op, 23) for node in source.nodes), default=23)
        self.graph = Graph("instance", opset)
        self.random = np.random.RandomState(0)
        self.variables: dict[str, Value] = {}
        self.nodes: dict[int, Node] = {}
        self.taken: set[Alternative] = set()

    def build(self) -> Instance:
        for argument in self.operator.signature.inputs:
            if argument.dims[0].startswith("*"):
                value = Value(self.graph.fresh_name(argument.name), self.types.x, shape_of(argument, self.example))
                for axis, dim in enumerate(value.shape or ()):
                    if not isinstance(dim, int):
                        self.graph.dim_sources.setdefault(dim, (value, axis))
                self.graph.inputs.append(value)
                self.variables[argument.name] = value
        outputs = [self._value(pattern, None) for pattern in self.source.outputs]
        if any(value is None or value.dtype is not self.types.x for value in outputs):
            raise IllTyped
        used = {name for name, value in self.variables.items() if value.uses}
        wanted = {a.name for a in self.operator.signature.inputs} - set(self.example.get("without", ()))
        if "w0" not in self.variables and used & {a.name for a in self.operator.signature.inputs} != wanted:
            raise IllTyped  # an optional argument the example has, or has not
        results = [value for value in outputs if value is not None]
        if "role" in self.example:
            results += self._consumer(results)
        for value in results:
            value.is_output = True
        self.graph.outputs = results
        self.graph.output_names = [value.name for value in results]
        self.graph.validate()
        inputs: dict[str, Value | list[Value]] = dict(self.variables)
        if "w0" in self.variables:
            parts = range(len(self.example["sizes"]))
            zeros = [self.graph.constant(Array.of(np.zeros(size), self.types.x)) for size in self.example["sizes"]]
            inputs = {
                "x": self.variables["x"],
                "weight": [self.variables[f"w{i}"] for i in parts],
                "bias": [self.variables.get(f"b{i}", zeros[i]) for i in parts],
            }
        taken = frozenset(self.taken)
        return Instance(self.operator, self.source, self.example, self.graph, inputs, taken)

    def _consumer(self, parts: list[Value]) -> list[Value]:
        """What makes several linears one: an attention of q, k and v, or the gate of gate and up."""
        if self.example["role"] == "gate_up":
            return [self._add("gated_mlp", parts[:2], {"activation": "silu"}, FUSER)]
        narrow = self.example["sizes"][1]
        q = self._add("Slice", parts[:1], {"axes": (-1,), "starts": (0,), "ends": (narrow,)})
        k, v = parts[1:]
        transposed = self._add("Transpose", [k], {"perm": (0, 2, 1)})
        scores = self._add("Softmax", [self._add("MatMul", [q, transposed], {})], {"axis": -1})
        return [self._add("MatMul", [scores, v], {})]

    def _add(
        self, op: str, inputs: list[Value | None] | list[Value], attributes: dict[str, Any], domain: str = ""
    ) -> Value:
        node = self.graph.add(op, inputs, attributes, domain=domain)
        infer_node(self.graph, node)
        return node.output

    def _value(self, pattern: Pattern | None, like: DType | None) -> Value | None:
        """The value of a pattern; `like` is the type a number takes."""
        if isinstance(pattern, Either):
            index = self.choice[id(pattern)]
            self.taken.add((id(pattern), index))
            return self._value(pattern.alternatives[index], like)
        if isinstance(pattern, Absent):
            index = self.choice[id(pattern)]
            self.taken.add((id(pattern), index))
            return self._value(pattern.present, like) if index == 0 else None
        if isinstance(pattern, Literal):
            return self._number(pattern.number, like)
        if isinstance(pattern, Var):
            if pattern.name not in self.variables:
                self.variables[pattern.name] = self._variable(pattern.name, like)
            return self.variables[pattern.name]
        if isinstance(pattern, Result):
            node = self.nodes.get(id(pattern.node)) or self._node(pattern.node)
            return node.outputs[pattern.index]
        return None

    def _number(self, number: float, dtype: DType | None) -> Value:
        stored = Array.of(number, dtype or self.types.x)
        if number and not stored.scalar:
            raise IllTyped  # an epsilon of 1e-12 is zero in float16
        return self.graph.constant(stored, "number")

    def _variable(self, name: str, like: DType | None) -> Value:
        if name in attributes_of(self.example):
            return self._number(self.example[name], like)
        arguments = {argument.name: argument for argument in self.operator.signature.inputs}
        if name in arguments:
            shape = dims.concrete(shape_of(arguments[name], self.example), {})
        else:  # one of several linears
            size = self.example["sizes"][int(name[1:])]
            shape = (self.example["D"], size) if name[0] == "w" else (size,)
        dtype = self.types.bias if name[0] == "b" else self.types.weight
        return self.graph.constant(Array.of(self.random.standard_normal(shape), dtype), name)

    def _node(self, wanted: Apply) -> Node:
        # Numbers take the type of what they meet, so they come last.
        is_number = [isinstance(p, Literal) or (isinstance(p, Var) and p.name == "eps") for p in wanted.inputs]
        values: list[Value | None] = [None] * len(wanted.inputs)
        like: DType | None = None
        for i in sorted(range(len(values)), key=lambda i: is_number[i]):
            values[i] = value = self._value(wanted.inputs[i], like)
            like = like or (value.dtype if value is not None else None)
        if wanted.op in NUMERIC and len({value.dtype for value in values if value is not None}) > 1:
            raise IllTyped
        attributes = {
            name: self.example[value.name] if isinstance(value, Capture) else value
            for name, value in wanted.attributes.items()
        }
        if wanted.op == "Cast":
            to = self.casts.pop(0) if self.casts else self.types.x
            if values[0] is None or values[0].dtype is to:
                raise IllTyped
            attributes["to"] = to.onnx
        if wanted.op == "Split":
            attributes["split"] = self.example["sizes"]
        node = self.graph.add(wanted.op, values, attributes, domain=wanted.domain, outputs=wanted.outputs)
        while node.inputs and node.inputs[-1] is None:
            node.inputs.pop()
        infer_node(self.graph, node)
        self.nodes[id(wanted)] = node
        return node
