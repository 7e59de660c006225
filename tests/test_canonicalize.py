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

# Sizes of the named dims. Graphs are legal at the first; at the others ONNX Runtime decides whether they are.
SIZES = (
    {"N": 2, "M": 3, "P": 4},
    {"N": 1, "M": 1, "P": 4},
    {"N": 1, "M": 3, "P": 0},
    {"N": 3, "M": 1, "P": 1},
    {"N": 0, "M": 2, "P": 3},
    {"N": 4, "M": 5, "P": 2},
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
        options = {"allowzero": 1} if self.opset >= 14 and self.rnd.random() < 0.2 else {}
        if choice == 0:
            return [self.add("Reshape", x, self.const(self.rnd.choice([[-1], [0, -1], [-1, 6], [0, 0, -1], [1, -1]])))]
        if choice == 1:
            return [self.add("Flatten", x, axis=self.rnd.randrange(-rank, rank + 1))]
        if choice == 2:  # merge two dims, or all, by what their sizes multiply to
            at = self.rnd.randrange(rank)
            parts: list[str | int] = [self.dim(x, axis) for axis in range(rank)]
            if at + 1 < rank:
                parts[at : at + 2] = [self.rnd.choice([-1, self.add("Mul", parts[at], parts[at + 1])])]
            return [self.add("Reshape", x, self.vector(parts), **options)]
        if choice == 3:  # split the last dim
            parts = [self.rnd.choice([0, self.dim(x, axis)]) for axis in range(rank - 1)]
            by = self.rnd.choice([1, 2, 3])
            return [self.add("Reshape", x, self.vector([*parts, by, -1]))]
        if choice == 4:  # any order of its dims, one of them perhaps left to -1
            parts = [self.dim(x, axis) for axis in self.rnd.sample(range(rank), rank)]
            if self.rnd.random() < 0.5:
                parts[self.rnd.randrange(rank)] = -1
            # Without allowzero a 0 is no size here but the word for "keep", which no exporter means by a computed dim.
            return [self.add("Reshape", x, self.vector(parts), **({"allowzero": 1} if self.opset >= 14 else {}))]
        if choice == 5:  # there and back
            whole = self.add("Shape", x)
            flat = self.add("Reshape", x, self.const([-1, int(self.values[x].shape[-1])]))
            return [flat, self.add("Reshape", self.add("Relu", flat), whole)]
        other = self.tensor()
        return [self.add("Reshape", x, self.add("Shape", other))]

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
            return [self.add("Reshape", y, self.add("Concat", lead, self.const([5]), axis=0))]
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
    onnx.checker.check_model(result, full_check=True)
    return graph, result


def assert_same(model: ModelProto, result: ModelProto, inputs: Callable[[dict[str, int]], Any] = feeds) -> int:
    """Asserts that both compute the same at every size that the first allows; returns how many do."""
    before, after, allowed = models.session(model), models.session(result), 0
    for sizes in SIZES:
        if 0 in sizes.values() and model.opset_import[0].version < 14:
            continue  # no allowzero yet: a dim of 0 cannot be given to a Reshape
        fed = inputs(sizes)
        try:
            expected = before.run(None, fed)
        except Exception:  # onnxruntime's exceptions share no base but Exception
            continue
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
