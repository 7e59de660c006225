"""Canonicalization is by true identities: random small graphs compute the same before and after, at every size.

The graphs are made of what exporters write around a transformer: shape arithmetic, reshapes, slices, casts and linear
maps, over dims that are 1 or 0 in some of the runs.
"""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

from fuser import operators
from fuser.canonicalize import canonicalize
from fuser.errors import FuserError
from fuser.exporter import export
from fuser.graph import Graph
from fuser.importer import from_proto
from tests import models
from tests.models import one, unshaped

# Sizes of the named dims. Graphs are legal at the first; at the others ONNX Runtime decides whether they are.
SIZES = (
    {"N": 2, "M": 3, "P": 4},
    {"N": 1, "M": 1, "P": 4},
    {"N": 1, "M": 3, "P": 0},
    {"N": 3, "M": 1, "P": 1},
    {"N": 4, "M": 5, "P": 2},
    {"N": 2, "M": 0, "P": 3},
)
INPUTS = {"x": ("N", "M", 6), "y": ("N", "P", 6), "z": ("M", 1), "w": ("P", "N", 2, 3)}
FAR = 2**63 - 1
FLOAT, INT, DOUBLE, BOOL = 1, 7, 11, 9


class Writer:
    """Writes a random graph that is legal at the first sizes."""

    def __init__(self, rnd: random.Random, opset: int) -> None:
        self.rnd, self.opset = rnd, opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.values: dict[str, torch.Tensor] = {n: torch.from_numpy(a) for n, a in feeds(SIZES[0]).items()}
        self.tensors = list(INPUTS)  # what later nodes may read: floats of rank 1 to 4 ...
        self.sizes: list[str] = []  # ... and scalars of int64 that came from shapes

    def const(self, data: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(data, dtype)
        self.values[name] = torch.from_numpy(np.array(self.weights[name]))
        return name

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """A node; raises FuserError where it is not legal."""
        found = operators.evaluate(
            op, "", attributes, [self.values[i] if i else None for i in inputs], outputs=outputs, opset=self.opset
        )
        names = [f"v{len(self.nodes)}" + (f"_{k}" if outputs > 1 else "") for k in range(outputs)]
        for name, value in zip(names, found, strict=True):
            if value is None or value.numel() > 5000 or (value.is_floating_point() and not (value.abs() < 1e3).all()):
                raise FuserError("too large to go on with")
            self.values[name] = value
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def axes(self, op: str, x: str, axes: list[int], **attributes: Any) -> str:
        """A node with axes, an attribute or an input by the opset."""
        if self.opset >= (13 if op in ("Squeeze", "Unsqueeze", "ReduceSum") else 18):
            return str(self.add(op, x, self.const(axes), **attributes))
        return str(self.add(op, x, axes=axes, **attributes))

    # Choices

    def tensor(self) -> str:
        return self.rnd.choice(self.tensors[-6:] + self.tensors[:4])

    def rank(self, name: str) -> int:
        return self.values[name].dim()

    def axis(self, name: str) -> int:
        return self.rnd.randrange(-self.rank(name), self.rank(name))

    def dim(self, name: str, axis: int) -> str:
        """The size of `name` along `axis` as an int64 scalar, in one of the ways exporters write it."""
        if self.opset >= 15 and self.rnd.random() < 0.3:
            end = axis + 1 if axis != -1 else FAR
            return str(self.axes("Squeeze", self.add("Shape", name, start=axis, end=end), [0]))
        shape = self.add("Shape", name)
        if self.rnd.random() < 0.3:
            end = axis + 1 if axis != -1 else FAR
            part = self.add("Slice", shape, self.const([axis]), self.const([end]), self.const([0]))
            return str(self.axes("Squeeze", part, [0]))
        return str(self.add("Gather", shape, self.const(axis), axis=0))

    def size(self) -> str:
        """A scalar computed from shapes."""
        if self.sizes and self.rnd.random() < 0.4:
            return self.rnd.choice(self.sizes)
        name = self.tensor()
        found = self.dim(name, self.axis(name))
        for _ in range(self.rnd.randrange(3)):
            other = self.rnd.choice([*self.sizes, self.const(self.rnd.randrange(1, 4))])
            op = self.rnd.choice(["Add", "Sub", "Mul", "Div", "Max", "Min"])
            if op == "Div":
                other = self.const(self.rnd.choice([2, 3, -2]))  # by zero is no arithmetic
            found = str(self.add(op, found, other))
        if self.rnd.random() < 0.2:
            found = str(self.add("Cast", self.add("Cast", found, to=6), to=INT))
        self.sizes.append(found)
        return found

    def vector(self, parts: list[str | int]) -> str:
        """A vector of scalars and numbers."""
        ones = [
            self.const([part])
            if isinstance(part, int)
            else self.axes("Unsqueeze", part, [0])
            if self.rnd.random() < 0.7
            else self.add("Reshape", part, self.const([1]))
            for part in parts
        ]
        return str(self.add("Concat", *ones, axis=0))

    # What a graph is made of. Each returns the names of new tensors.

    def elementwise(self) -> list[str]:
        x = self.tensor()
        choice = self.rnd.randrange(10)
        if choice == 0:
            x = self.add("Identity", x)
        elif choice == 1:
            x = self.add("Cast", self.add("Cast", x, to=DOUBLE), to=FLOAT)
        elif choice == 2:
            x = self.add("Pow", x, self.const(self.rnd.choice([1.0, 2.0, 3.0]), np.float32))
        elif choice == 3:
            positive = self.add("Add", self.add("Abs", x), self.const([0.5], np.float32))
            x = self.add(self.rnd.choice(["Sqrt", "Reciprocal"]), positive)
            if self.rnd.random() < 0.6:
                x = self.add(self.rnd.choice(["Sqrt", "Reciprocal"]), x)
        elif choice == 4:
            positive = self.add("Add", self.add("Mul", x, x), self.const(1e-5, np.float32))
            x = self.add("Div", self.rnd.choice([x, self.const(1.0, np.float32)]), self.add("Sqrt", positive))
        elif choice == 5:
            number = self.rnd.choice([1.0, 0.0, 2.0, -0.3, 7.0])
            op = self.rnd.choice(["Add", "Sub", "Mul"] + (["Div"] if number else []))
            x = self.add(op, x, self.const(self.rnd.choice([number, [number], [[[number]]]]), np.float32))
        elif choice == 6:
            x = self.add(self.rnd.choice(["Relu", "Neg", "Sigmoid", "Tanh", "Erf", "Ceil"]), x)
        elif choice == 7:
            x = self.add("Pow", self.add("Abs", x), self.const(self.rnd.choice([0.5, -0.5]), np.float32))
        else:
            x = self.add(self.rnd.choice(["Add", "Mul", "Sub", "Max", "Min"]), x, self.tensor())
        return [x]

    def transpose(self) -> list[str]:
        x = self.tensor()
        return [self.add("Transpose", x, perm=self.rnd.sample(range(self.rank(x)), self.rank(x)))]

    def reshape(self) -> list[str]:
        x = self.tensor()
        rank, choice = self.rank(x), self.rnd.randrange(7)
        if choice == 0:
            return [self.add("Reshape", x, self.const(self.rnd.choice([[-1], [0, -1], [-1, 6], [0, 0, -1], [1, -1]])))]
        if choice == 1:
            return [self.add("Flatten", x, axis=self.rnd.randrange(-rank, rank + 1))]
        parts: list[str | int] = [self.dim(x, axis) for axis in range(rank)]
        if choice == 2 and rank > 1:  # the last dims to one
            merged = self.rnd.choice([-1, self.add("Mul", parts[-2], parts[-1])])
            return [self.add("Reshape", x, self.vector([*parts[:-2], merged]))]
        if choice == 3 and rank > 1:  # any two to one
            at = self.rnd.randrange(rank - 1)
            parts[at : at + 2] = [self.add("Mul", parts[at], parts[at + 1])]
            return [self.add("Reshape", x, self.vector(parts), **self.allowing_zero())]
        if choice == 4:  # the last dim to two
            kept = [self.rnd.choice([0, part]) for part in parts[:-1]]
            return [self.add("Reshape", x, self.vector([*kept, self.rnd.choice([1, 2, 3]), -1]))]
        if choice == 5:  # any order
            self.rnd.shuffle(parts)
            return [self.add("Reshape", x, self.vector(parts), **self.allowing_zero())]
        # there and back
        flat = self.add("Reshape", x, self.const([-1, int(self.values[x].shape[-1])]))
        whole = self.add("Shape", self.rnd.choice([x, x, self.tensor()]))
        return [flat, self.add("Reshape", self.add("Relu", flat), whole, **self.allowing_zero())]

    def allowing_zero(self) -> dict[str, int]:
        """Without allowzero a computed 0 is no size but the word for "keep", which no exporter means by it."""
        return {"allowzero": 1} if self.opset >= 14 else {}

    def unsqueeze(self) -> list[str]:
        x = self.tensor()
        if self.rank(x) == 4 or self.rnd.random() < 0.4:
            units = [axis for axis in range(self.rank(x)) if self.values[x].shape[axis] == 1]
            return [self.axes("Squeeze", x, [self.rnd.choice(units)])] if units and self.rank(x) > 1 else []
        return [self.axes("Unsqueeze", x, [self.rnd.randrange(-self.rank(x) - 1, self.rank(x) + 1)])]

    def slice(self) -> list[str]:
        x = self.tensor()
        axis = self.axis(x)
        start, end = (
            self.vector([self.size()])
            if self.rnd.random() < 0.4
            else self.const([self.rnd.choice([0, 0, 1, 2, -1, -2, -3, 3, FAR, -FAR - 1])])
            for _ in range(2)
        )
        if self.rnd.random() < 0.4:
            end = self.const([FAR])
        step = [self.const([self.rnd.choice([1, 2, -1, -2])])] if self.rnd.random() < 0.3 else []
        return [self.add("Slice", x, start, end, self.const([axis]), *step)]

    def slices_that_partition(self) -> list[str]:
        x = self.tensor()
        size = self.values[x].shape[-1]
        if size < 2:
            return []
        cut = self.rnd.randrange(1, size)
        last = self.const([-1])
        return [
            self.add("Slice", x, self.const([0]), self.const([cut]), last),
            self.add("Slice", x, self.const([self.rnd.choice([cut, cut - size])]), self.const([FAR]), last),
        ]

    def split(self) -> list[str]:
        x = self.tensor()
        axis = self.axis(x)
        size = self.values[x].shape[axis]
        if self.rnd.random() < 0.5 and size > 1:
            cut = self.rnd.randrange(1, size)
            return list(self.add("Split", x, self.const([cut, size - cut]), outputs=2, axis=axis))
        if size % 2 or not size:
            return []
        return list(self.add("Split", x, outputs=2, axis=axis, **({"num_outputs": 2} if self.opset >= 18 else {})))

    def concat(self) -> list[str]:
        x = self.tensor()
        axis = self.axis(x)
        others = [
            name
            for name in self.tensors
            if self.rank(name) == self.rank(x)
            and all(
                a == b or i == axis % self.rank(x)
                for i, (a, b) in enumerate(zip(self.values[name].shape, self.values[x].shape, strict=True))
            )
        ]
        parts = [x, *self.rnd.choices(others, k=self.rnd.randrange(3))]
        if self.rnd.random() < 0.3 and self.rank(x) == 3:
            none = self.add("Slice", x, self.const([0]), self.const([0]), self.const([axis]))
            parts.insert(self.rnd.randrange(2), none)
        return [self.add("Concat", *parts, axis=axis)]

    def expand(self) -> list[str]:
        x = self.tensor()
        choice = self.rnd.randrange(4)
        if choice == 0:
            shape = self.add("Shape", self.tensor())
        elif choice == 1:
            shape = self.const(self.rnd.choice([[1], [2, 1, 1], [1, 1, 1], [6]]))
        elif choice == 2:
            shape = self.vector([self.rnd.choice([1, self.dim(x, axis)]) for axis in range(self.rank(x))])
        else:  # torch's expand(-1, n, ...): -1 keeps a dim
            wanted = self.vector([self.rnd.choice([-1, self.dim(x, axis)]) for axis in range(self.rank(x))])
            value = numpy_helper.from_array(np.array([1], np.int64))
            ones = self.add("ConstantOfShape", self.const([self.rank(x)]), value=value)
            minus = self.add("Mul", ones, self.const(-1))
            shape = self.add("Where", self.add("Equal", wanted, minus), ones, wanted)
        expanded = self.add("Expand", x, shape)
        return [expanded, self.add("Add", expanded, self.tensor())] if self.rnd.random() < 0.5 else [expanded]

    def gather(self) -> list[str]:
        x = self.tensor()
        return [self.add("Gather", x, self.const(self.rnd.choice([0, [0], [-1, 0], [[0, 0]]])), axis=self.axis(x))]

    def linear(self) -> list[str]:
        x = self.tensor()
        width = int(self.values[x].shape[-1])
        weight = self.const(models.random(width, 5, seed=len(self.nodes)), np.float32)
        if self.rnd.random() < 0.4:
            shape, flat = self.add("Shape", x), self.add("Reshape", x, self.const([-1, width]))
            bias = self.const(self.rnd.choice([models.random(5), models.random(1)]), np.float32)
            if self.rnd.random() < 0.5:
                turned = self.const(np.array(self.weights[weight]).T, np.float32)
                y = self.add("Gemm", flat, turned, bias, transB=1, **self.rnd.choice([{}, {"alpha": 0.5}]))
            else:
                y = self.add("Add", self.add("MatMul", flat, weight), bias)
            if self.rnd.random() < 0.5:
                y = self.add("Relu", y)
            lead = self.add("Slice", shape, self.const([0]), self.const([-1]), self.const([0]))
            return [self.add("Reshape", y, self.add("Concat", lead, self.const([5]), axis=0), **self.allowing_zero())]
        return [self.add("MatMul", x, weight)]

    def reduce(self) -> list[str]:
        x = self.tensor()
        op = self.rnd.choice(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceSumSquare"])
        # Of an empty tensor, ONNX Runtime reduces no axis that is counted from the back.
        y = self.axes(op, x, [self.axis(x) % self.rank(x)], keepdims=self.rnd.choice([0, 1, 1]))
        if op.startswith("ReduceSum") and self.rnd.random() < 0.5:
            y = self.add("Div", y, self.const(float(self.rnd.choice([6, 3])), np.float32))
        return [y]

    def range(self) -> list[str]:
        start, step = self.rnd.choice([(0, 1), (0, 1), (1, 1), (3, -1), (0, 2), (-2, 1)])
        end = self.size()
        made = self.add("Range", self.rnd.choice([self.const(start), self.size()]), end, self.const(step))
        return [self.add("Cast", made, to=FLOAT)]

    def where(self) -> list[str]:
        x, y = self.tensor(), self.tensor()
        mask = self.add(self.rnd.choice(["Less", "LessOrEqual", "Greater"]), x, y)
        if self.rnd.random() < 0.3:
            mask = self.add("Not", mask)
        return [self.add("Where", mask, x, self.const(-1.0, np.float32))]

    def choice_by_size(self) -> list[str]:
        same = self.add("Equal", self.size(), self.size())
        return [self.add("Where", same, self.tensor(), self.tensor())]

    def tile(self) -> list[str]:
        x = self.tensor()
        return [self.add("Tile", x, self.const([self.rnd.choice([1, 1, 2]) for _ in range(self.rank(x))]))]

    def filled(self) -> list[str]:
        parts: list[str | int] = [self.size() if self.rnd.random() < 0.5 else self.rnd.randrange(3) for _ in range(2)]
        value = numpy_helper.from_array(np.array([0.5], np.float32))
        return [self.add("ConstantOfShape", self.vector(parts), value=value)]

    def again(self) -> list[str]:
        """A node that is there already."""
        if not self.nodes:
            return []
        node = self.rnd.choice(self.nodes)
        values = [self.values[name] for name in node.output]
        names = [f"v{len(self.nodes)}" + (f"_{k}" if len(values) > 1 else "") for k in range(len(values))]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.output[:] = names
        self.nodes.append(copy)
        self.values.update(zip(names, values, strict=True))
        return names

    PARTS: tuple[Callable[["Writer"], list[str]], ...] = (
        elementwise, elementwise, transpose, reshape, reshape, reshape, unsqueeze, slice, slice, slices_that_partition,
        split, concat, expand, expand, gather, linear, linear, reduce, range, where, choice_by_size, tile, filled, again,
    )  # fmt: skip

    def write(self) -> ModelProto:
        for _ in itertools.repeat(None, self.rnd.randrange(2, 9)):
            before = len(self.nodes)
            try:
                made = self.rnd.choice(self.PARTS)(self)
            except FuserError:
                del self.nodes[before:]
                self.sizes = [name for name in self.sizes if name in self._made()]
                continue
            self.tensors += [
                name
                for name in made
                if self.values[name].dtype == torch.float32 and 0 < self.rank(name) <= 4 and self.values[name].numel()
            ]
        return self._model()

    def _made(self) -> set[str]:
        return {name for node in self.nodes for name in node.output}

    def _model(self) -> ModelProto:
        made = self._made()
        outputs = [name for name in self.tensors if name in made][-3:] + [n for n in self.sizes if n in made][-2:]
        types = {torch.float32: FLOAT, torch.int64: INT}
        infos = [models.tensor(n, [None] * self.rank(n), types[self.values[n].dtype]) for n in dict.fromkeys(outputs)]
        used = {name for node in self.nodes for name in node.input}
        weights = [numpy_helper.from_array(a, n) for n, a in self.weights.items() if n in used]
        inputs = [models.tensor(name, shape) for name, shape in INPUTS.items()]
        graph = helper.make_graph(self.nodes, "g", inputs, infos, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)


def feeds(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    return {
        name: models.random(*(sizes[d] if isinstance(d, str) else d for d in shape), seed=seed)
        for seed, (name, shape) in enumerate(INPUTS.items())
    }


def canonical(model: ModelProto) -> tuple[Graph, ModelProto]:
    """A model's canonical graph, and that graph as a model; the graph is valid at every stage."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = from_proto(copy, Path())
    graph.validate()
    canonicalize(graph)
    graph.validate()
    result = export(graph, "ort", {}).model
    graph.validate()
    if all(output.type.tensor_type.HasField("shape") for output in model.graph.output):
        onnx.checker.check_model(result, full_check=True)
    return graph, result


def assert_same(model: ModelProto, result: ModelProto, inputs: Callable[[dict[str, int]], Any] = feeds) -> int:
    """Asserts that both compute the same at every size that the first allows; returns how many do."""
    before, after, allowed = models.session(model), models.session(result), 0
    for sizes in SIZES:
        fed = inputs(sizes)
        try:
            expected = before.run(None, fed)
        except Exception:  # onnxruntime's exceptions share no base but Exception
            continue
        if model.opset_import[0].version < 14 and (0 in sizes.values() or not all(array.size for array in expected)):
            continue  # there is no allowzero yet: a Reshape cannot be told that a dim is 0
        allowed += 1
        for info, actual, wanted in zip(after.get_outputs(), after.run(None, fed), expected, strict=True):
            message = f"{info.name} at {sizes}"
            assert actual.shape == wanted.shape, f"{message}: {actual.shape}, was {wanted.shape}"
            assert actual.dtype == wanted.dtype, message
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4, err_msg=message)
    return allowed


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
@given(st.integers(0, 2**32), st.sampled_from([13, 14, 17, 18, 23]))
def test_random_graphs_compute_the_same(seed: int, opset: int) -> None:
    model = Writer(random.Random(seed), opset).write()
    if model.graph.output:
        onnx.checker.check_model(model)
        _, result = canonical(model)
        assert assert_same(model, result) >= 1


# Places where a shortcut is not an identity, each at the size that shows it.

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "slice from the end of fewer": (
        "(float[N, M, 6] x) => (float y) { y = Slice(x, s, e, a) }",
        {"s": [-3], "e": [FAR], "a": [1]},
    ),
    "slice to a bound that is negative at some sizes": (
        """(float[N, M, 6] x, float[N, P, 6] y) => (float z) {
            n = Shape <start = 1, end = 2> (x) p = Shape <start = 1, end = 2> (y) d = Sub(n, p)
            z = Slice(x, s, d, a)
        }""",
        {"s": [0], "a": [1]},
    ),
    "slice whose bounds cross": (
        """(float[N, M, 6] x, float[N, P, 6] y) => (float z) {
            p = Shape <start = 1, end = 2> (y) z = Slice(x, p, e, a)
        }""",
        {"e": [2], "a": [1]},
    ),
    "halves of what may be negative": (
        """(float[N, M, 6] x, float[N, P, 6] y) => (int64 z) {
            n = Shape <start = 1, end = 2> (x) p = Shape <start = 1, end = 2> (y) d = Sub(n, p) z = Div(d, two)
        }""",
        {"two": [2]},
    ),
    "a size that is halved evenly": (
        """(float[N, M, 6] x) => (int64 z) {
            n = Shape <start = 0, end = 1> (x) a = Mul(n, six) b = Min(a, twenty) z = Div(b, two)
        }""",
        {"six": [6], "twenty": [20], "two": [2]},
    ),
    "range that is empty or goes down": (
        """(float[N, M, 6] x, float[N, P, 6] y) => (int64 up, int64 down) {
            n = Shape <start = 1, end = 2> (x) p = Shape <start = 1, end = 2> (y)
            a = Squeeze(n) b = Squeeze(p) up = Range(a, b, one) down = Range(b, a, minus)
        }""",
        {"one": 1, "minus": -1},
    ),
    "a dim that is 1 is broadcast": (
        "(float[N, M, 6] x, float[M, 1] z) => (float a, float b) { a = Add(x, z) s = Shape(x) b = Expand(z, s) }",
        {},
    ),
    "dims of one name in two inputs": (
        "(float[N, M, 6] x, float[N, P, 6] y) => (float a, float b) {"
        " s = Shape(x) n = Gather <axis = 0> (s, zero) v = Concat <axis = 0> (n, minus) a = Reshape(y, v)"
        " c = ReduceMean <axes = [1]> (x) d = ReduceMean <axes = [1]> (y) b = Add(c, d) }",
        {"zero": [0], "minus": [-1]},
    ),
    "reshape of a past that is empty": (
        "(float[P, N, 2, 3] w) => (float a, float b) { s = Shape(w) p = Gather <axis = 0> (s, zero)"
        " n = Gather <axis = 0> (s, one) six = Concat <axis = 0> (n, p, last) t = Transpose <perm = [1, 0, 2, 3]> (w)"
        " a = Reshape(t, six) double = Mul(n, two) v = Concat <axis = 0> (p, double, three)"
        " b = Reshape <allowzero = 1> (w, v) }",
        {"zero": [0], "one": [1], "two": [2], "three": [3], "last": [6]},
    ),
    "a cast to bool is a question": (
        "(float[N, P, 6] y, float[N, M, 6] x) => (float z) { p = Shape <start = 1, end = 2> (y) c = Cast <to = 9> (p)"
        " z = Where(c, x, k) }",
        {"k": np.float32(7)},
    ),
    "the largest and the least of several": (
        "(float[N, M, 6] x, float[N, P, 6] y) => (int64 a, int64 b, int64 c) {"
        " n = Shape <start = 0, end = 2> (x) p = Shape <start = 1, end = 2> (y) a = Max(n, p, two) b = Min(two, p, n)"
        " c = Max(n) }",
        {"two": [2]},
    ),
    "numbers at the end of their type": (
        "(float[N, M, 6] x) => (int64 a, int64 b, float c) { n = Shape <start = 0, end = 1> (x)"
        f" a = ConstantOfShape <value = int64[1] {{{FAR}}}> (two) b = Add(a, n) c = Slice(x, zero, a) }}",
        {"two": [2], "zero": [0, 0]},
    ),
    "vectors of no elements": (
        "(float[N, M, 6] x) => (int64 a, float b) { s = Shape <start = 3> (x) a = Add(s, one) c = Concat <axis = 0> (s, whole)"
        " b = Reshape(x, c) }",
        {"one": [1], "whole": [-1]},
    ),
    "one of two vectors, chosen by one answer": (
        "(float[N, M, 6] x) => (int64 a) { n = Shape <start = 0, end = 1> (x) c = Equal(n, n) a = Where(c, n, pair) }",
        {"pair": [5, 6]},
    ),
    "a size nobody knows": (
        "(float[N, M, 6] x) => (int64 n, float y, int64 s) { z = NonZero(x) n = Shape(z) t = Transpose(z) f = Cast <to = 1> (t)"
        " g = Relu(f) d = Shape(g) s = Gather <axis = 0> (d, zero) v = Concat <axis = 0> (one, d)"
        " h = Reshape <allowzero = 1> (g, v) y = Mul(h, h) }",
        {"zero": 0, "one": [1]},
    ),
    "a size only its own -1 knows": (
        "(float[N, M, 6] x) => (float b) { s = Shape(x) m = Gather <axis = 0> (s, one) v = Concat <axis = 0> (m, two, minus)"
        "  a = Reshape <allowzero = 1> (x, v) t = Shape(a) u = Gather <axis = 0> (t, last) w = Concat <axis = 0> (u, minus)"
        " c = Relu(a) b = Reshape <allowzero = 1> (c, w) }",
        {"one": [1], "two": [2], "minus": [-1], "last": [2]},
    ),
    "the mean of nothing left out": (
        "(float[N, M, 6] x) => (float y) { s = ReduceSum <noop_with_empty_axes = 1> (x, none) y = Mul(s, one) }",
        {"none": np.zeros(0, np.int64), "one": np.float32(1)},
    ),
    "parts of an axis": (
        "(float[N, M, 6] x) => (float a, float b, float c) { a = Slice(x, zero, two, last) b = Slice(x, two, far, last)"
        " c = Slice(x, two, far, last) }",
        {"zero": [0], "two": [2], "far": [FAR], "last": [-1]},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("opset", [15, 23])
def test_shortcuts_that_are_none(case: str, opset: int) -> None:
    text, weights = CASES[case]
    if opset >= 18:
        text = text.replace("ReduceMean <axes = [1]> (x)", "ReduceMean(x, axis)").replace(
            "ReduceMean <axes = [1]> (y)", "ReduceMean(y, axis)"
        )
    given = {**weights, **({"axis": [1]} if "axis)" in text else {})}
    model = unshaped(one(text, {name: np.asarray(w) for name, w in given.items()}, opset=opset))
    names = [value.name for value in model.graph.input]
    _, result = canonical(model)
    assert assert_same(model, result, lambda sizes: {name: feeds(sizes)[name] for name in names}) >= 3


def test_small_divisors_stay_divisors() -> None:
    """In float16, 1 / 1e-5 is infinite."""
    model = one("(float16[N] x) => (float16[N] y) { y = Div(x, c) }", {"c": np.float16(1e-5)})
    _, result = canonical(model)
    x = np.array([1e-5, 2e-4, 0], np.float16)
    np.testing.assert_array_equal(models.run(result, {"x": x})[0], models.run(model, {"x": x})[0])


def test_random_numbers_are_drawn_as_often_as_before() -> None:
    text = (
        "(float[N, M] x) => (float a, float b, float c, float d) {"
        " a = RandomNormal <shape = [3]> () b = RandomNormal <shape = [3]> ()"
        " c = RandomUniformLike(x) d = RandomUniformLike(x) }"
    )
    graph, result = canonical(unshaped(one(text)))
    assert len(graph.nodes) == 4
    a, b, c, d = models.run(result, {"x": np.ones((2, 3), np.float32)})
    assert (a != b).all() and (c != d).all()


def test_captured_values_survive_every_rule() -> None:
    """Whatever a rule would take away stays where a control-flow body reads it by name."""
    nodes = {
        "Identity(x)": "Identity", "Cast <to = 1> (x)": "Cast", "Mul(x, one)": "Mul", "Add(x, zero)": "Add",
        "Transpose <perm = [0, 1]> (x)": "Transpose", "Reshape(x, shape)": "Reshape", "Expand(x, shape)": "Expand",
        "Slice(x, lo, hi)": "Slice", "Concat <axis = 0> (x)": "Concat", "Pow(x, two)": "Pow", "Div(x, two)": "Div",
        "Sub(x, two)": "Sub", "Gemm(x, w)": "Gemm", "Sum(x)": "Sum", "Dropout(x)": "Dropout", "Relu(x)": "Relu",
        "Add(one, one)": "Add",
    }  # fmt: skip
    weights = {
        "one": np.float32(1), "zero": np.float32(0), "two": np.float32(2), "shape": np.array([2, 2]),
        "lo": np.array([0, 0]), "hi": np.array([FAR, FAR]), "w": models.random(2, 2),
    }  # fmt: skip
    x = models.random(2, 2)
    for text, op in nodes.items():
        branches = "then_branch = t () => (float t_out) { t_out = Neg(v) },"
        branches += "else_branch = e () => (float e_out) { e_out = Abs(v) }"
        body = f"first = {text} v = {text} z = Relu(v) y = If (c) <{branches}>"
        model = unshaped(one(f"(float[2, 2] x, bool c) => (float y, float z) {{ {body} }}", weights))
        _, result = canonical(model)
        assert sum(node.op_type == op for node in result.graph.node) >= (op != "Relu"), text
        for c in (True, False):
            fed = {"x": x, "c": np.array(c)}
            for actual, expected in zip(models.run(result, fed), models.run(model, fed), strict=True):
                np.testing.assert_allclose(actual, expected, rtol=1e-6, err_msg=text)


# What is left when exporters' ways of writing one thing have become one.

FORMS = {
    "inverse square root": (
        "Mul Rsqrt",
        ["r = Sqrt(x) y = Div(k, r)", "r = Sqrt(x) s = Reciprocal(r) y = Mul(k, s)", "s = Pow(x, mhalf) y = Mul(k, s)",
         "r = Pow(x, half) y = Div(k, r)", "r = Reciprocal(x) s = Sqrt(r) y = Mul(k, s)",
         "r = Sqrt(x) s = Div(one, r) y = Mul(k, s)"],
    ),
    "linear": (
        "MatMul Add",
        ["a = MatMul(x, w) y = Add(a, b)", "y = Gemm(x, w, b)", "y = Gemm <transB = 1> (x, wt, b)",
         "t = Transpose(wt) a = MatMul(x, t) y = Add(b, a)",
         "s = Shape(x) f = Reshape(x, flat) a = MatMul(f, w) d = Add(a, b) y = Reshape(d, s)",
         "c = Cast <to = 11> (x) d = Cast <to = 1> (c) i = Identity(d) a = MatMul(i, w) y = Add(a, b)"],
    ),
    "mean of squares": (
        "Mul ReduceMean",
        ["q = Pow(x, two) y = ReduceMean <axes = [-1]> (q)", "q = Mul(x, x) y = ReduceMean <axes = [1]> (q)",
         "q = ReduceSumSquare <axes = [1]> (x) y = Mul(q, fourth)", "q = ReduceSumSquare <axes = [-1]> (x) y = Div(q, four)"],
    ),
    "nothing": (
        "Relu",
        ["y = Relu(x)", "a = Identity(x) d = Dropout(a) y = Relu(d)", "s = Shape(x) a = Expand(x, s) y = Relu(a)",
         "a = Slice(x, zeros, far, axes) y = Relu(a)", "a = Transpose(x) d = Transpose(a) y = Relu(d)",
         "a = Unsqueeze(x, axes1) d = Squeeze(a, axes1) y = Relu(d)", "a = Mul(x, one) d = Add(a, zero) y = Relu(d)",
         "s = Shape(x) n = Gather <axis = 0> (s, i0) m = Gather <axis = 0> (s, i1) t = Concat <axis = 0> (n, m)"
         " a = Reshape(x, t) y = Relu(a)",
         "s = Shape(x) o = ConstantOfShape <value = int64[1] {1}> (two_i) m = Mul(o, minus) q = Equal(s, m) e = Where(q, o, s)"
         " a = Expand(x, e) y = Relu(a)"],
    ),
}  # fmt: skip
FORM_WEIGHTS = {
    "k": models.random(4), "w": models.random(4, 4), "wt": models.random(4, 4).T.copy(), "b": models.random(4, seed=3),
    "half": np.float32(0.5), "mhalf": np.float32(-0.5), "one": np.float32(1), "zero": np.float32(0), "two": np.float32(2),
    "four": np.float32(4), "fourth": np.float32(0.25), "flat": np.array([-1, 4]), "zeros": np.array([0]),
    "far": np.array([FAR]), "axes": np.array([0]), "axes1": np.array([1]), "i0": np.array([0]), "i1": np.array([1]),
    "two_i": np.array([2]), "minus": np.array(-1),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_ways_of_writing_one_thing_become_one(form: str) -> None:
    expected, ways = FORMS[form]
    x = np.abs(models.random(3, 4)) + 0.1
    for way in ways:
        model = unshaped(one(f"(float[N, 4] x) => (float y) {{ {way} }}", FORM_WEIGHTS))
        graph, result = canonical(model)
        assert sorted(node.op for node in graph.nodes) == sorted(expected.split()), way
        actual, wanted = models.run(result, {"x": x})[0], models.run(model, {"x": x})[0]
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, err_msg=way)
