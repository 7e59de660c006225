"""The source patterns of fused operators as plain graphs: every way a pattern can be written, built from the pattern.

A pattern is walked with one alternative chosen for each `either` and `maybe`; variables become graph inputs and constants of
the shapes that the operator's signature and example state, literals and captures become numbers. Casts have no type in a
pattern: of all types they may have, the first assignment that ONNX would accept is taken, in a float16 graph.

In an example `B: (2, 3)` are the leading dims `*B`, symbols in the graph; so are B, S, P and T alone. `*M` may name the dims
it is made of: `M: ("B", 1, "S", "T")`. `without` lists the inputs that are absent, `kinds` says how some are drawn.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import sympy
import torch
from numpy.typing import NDArray

from fuser import dims
from fuser.constants import Array
from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.errors import InputError
from fuser.fused import Argument, FusedOp, Source
from fuser.graph import FUSER, Graph, Node, Value
from fuser.pattern import Absent, Apply, Capture, CheckFailed, Either, Literal, Pattern, Result, Var
from fuser.patterns.attention import LEAST
from fuser.shapes import infer_node
from fuser.tensors import to_tensor

Alternative = tuple[int, int]  # id of an Either (or Absent), and which of its forms
NEWEST = {"Swish": 24}
NUMERIC = frozenset({"Add", "Sub", "Mul", "Div", "MatMul", "Where"})
DYNAMIC = frozenset({"B", "S", "P", "T"})
ASIDE = frozenset({"without", "kinds"})  # what an example says that is neither a dim nor an attribute
WHOLE = ("positions", "padding")  # kinds of int64 inputs
STANDS_FOR = {"allowed": "mask"}  # variables of patterns that an input is made of


class IllTyped(Exception):
    """ONNX would not accept these types and shapes, or the result is not the example."""


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
        sizes = [
            n for name, n in self.example.items() if name in DYNAMIC for n in (n if isinstance(n, tuple) else (n,))
        ]
        return f"{self.operator.name}-{self.source.function.__name__}-{'x'.join(map(str, sizes))}-{self.number}"

    @property
    def dtype(self) -> DType:
        found = self.graph.inputs[0].dtype
        assert found is not None
        return found

    def feeds(self) -> dict[str, NDArray[Any]]:
        """Random graph inputs of the example's own sizes."""
        random = np.random.RandomState(1)
        made = {}
        for value in self.graph.inputs:
            assert value.dtype is not None and value.shape is not None
            shape = dims.concrete(value.shape, sizes(self.example))
            kind = kind_of(value.name, self.example)
            made[value.name] = drawn(random, shape, kind, self.dtype, as_condition=value.dtype is DType.BOOL)
        return made

    def reference(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """What the operator's reference function gives in float64."""
        arguments: list[torch.Tensor | None] = []
        for argument in self.operator.signature.inputs:
            given = self.inputs.get(argument.name)
            parts = given if isinstance(given, list) else [] if given is None else [given]
            kind = kind_of(argument.name, self.example)
            tensors = [exact(v.constant.numpy() if v.constant else feeds[v.name], kind) for v in parts]
            arguments.append(torch.cat(tensors, -1) if tensors else None)
        found = self.operator.evaluate(arguments, attributes_of(self.example))
        return [tensor.numpy() for tensor in found]


def attributes_of(example: dict[str, Any]) -> dict[str, Any]:
    """The operator's attributes in an example: what is no dim."""
    return {name: value for name, value in example.items() if name[0].islower() and name not in ASIDE}


def kind_of(name: str, example: dict[str, Any]) -> str:
    """How an argument is drawn: `normal`, or a mask that is `bool`, or 0 and the `lowest` number, or 0 and `infinite`;
    whole `positions`, a `padding` of 0 and 1, or the `sizes` of `*M`.
    """
    found: str = example.get("kinds", {}).get(STANDS_FOR.get(name, name), "normal")
    return found


def drawn(
    random: np.random.RandomState, shape: Sequence[int], kind: str, dtype: DType, *, as_condition: bool = False
) -> NDArray[Any]:
    """A random array. A mask allows nothing to its first row and about half to the others; it may be given as a bool."""
    if kind == "normal":
        return np.asarray(random.standard_normal(shape)).astype(dtype.numpy)
    if kind in WHOLE:
        return random.randint(0, {"positions": 50, "padding": 2}[kind], shape).astype(np.int64)
    allowed = random.randint(0, 2, shape).astype(np.bool_)
    allowed[..., -1] = True
    if dtype is not DType.FLOAT16 or kind != "lowest":  # there such a row depends on which sums are rounded
        allowed[(0,) * (allowed.ndim - 1)] = False
    if as_condition or kind == "bool":
        return allowed
    masked = ml_dtypes.finfo(dtype.numpy).min if kind == "lowest" else -np.inf
    return np.where(allowed, 0, masked).astype(dtype.numpy)


def exact(array: NDArray[Any], kind: str) -> torch.Tensor:
    """An array for the reference in float64, where the lowest number is another."""
    tensor = to_tensor(array)
    if kind in (*WHOLE, "sizes"):
        return tensor
    if kind == "lowest":
        allowed = tensor if tensor.dtype == torch.bool else tensor == 0
        return torch.zeros(tensor.shape).double().masked_fill(~allowed, torch.finfo(torch.float64).min)
    return tensor if tensor.dtype == torch.bool else tensor.double()


def sizes(example: dict[str, Any]) -> dict[sympy.Symbol, int]:
    """The sizes of an example's symbols."""
    found = {dims.symbol(name): size for name, size in example.items() if name in DYNAMIC and isinstance(size, int)}
    lead = example["B"] if isinstance(example.get("B"), tuple) else ()
    return found | {dims.symbol(f"B{i}"): size for i, size in enumerate(lead)}


def shape_of(argument: Argument, example: dict[str, Any]) -> Shape:
    """An argument's shape in an example; dims that vary are symbols, leading ones `B0`, `B1` ..."""

    def dim(name: Any) -> dims.Dim:
        found: dims.Dim = dims.symbol(name) if name in DYNAMIC else example.get(name, name)
        return found

    shape: list[dims.Dim] = []
    for name in argument.dims:
        if name == "*B":
            shape.extend(dims.symbol(f"B{i}") for i in range(len(example["B"])))
        elif name.startswith("*"):
            shape.extend(dim(inner) for inner in example[name[1:]])
        else:
            shape.append(dim(name))
    return tuple(shape)


def is_weight(argument: Argument, example: dict[str, Any]) -> bool:
    """Whether an argument is a constant: its size is the same in every call."""
    return not dims.symbols(shape_of(argument, example))


def instances(operator: FusedOp) -> Iterator[Instance]:
    """Instances of each source and example of an operator that together take every alternative."""
    for source in operator.sources:
        seen: set[Alternative] = set()
        everything = alternatives(source)
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
                if not first and everything <= seen:
                    break


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
    if source.operator.name == "rotary" and len(example["C"]) != 3 and "RotaryEmbedding" in names:
        return False
    if (
        source.operator.name == "rotary"
        and "RotaryEmbedding" not in names
        and example["interleaved"] != ("Slice" in names)
    ):
        return False
    if source.operator.name == "attention" and example["merged"] != ({"attention", "Reshape"} <= names):
        return False
    if source.operator.name == "attention" and {"attention", "Not"} <= names:
        return example["guarded"] and kind_of("mask", example) == "bool"
    if source.operator.name == "rotary" and len(example["C"]) == 3 and "RotaryEmbedding" not in names:
        return False  # to a product these tables would be [heads, tokens, R]
    mandatory = set().union(*(_variables(p, optional=False) for p in source.outputs))
    possible = set().union(*(_variables(p, optional=True) for p in source.outputs))
    if any(name.startswith(("w0", "b0")) for name in possible):
        return True
    tensors = {argument.name for argument in source.operator.signature.inputs}
    given = tensors - set(example.get("without", ()))
    return mandatory & tensors <= given <= possible


def _variables(pattern: Pattern | None, optional: bool) -> set[str]:
    if isinstance(pattern, Var):
        return {STANDS_FOR.get(pattern.name, pattern.name.removeprefix("key_"))}
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
    """The instances of one source and one example, one for each choice of alternatives that types and shapes allow."""
    picks = _Picks()
    built: set[frozenset[Alternative]] = set()
    while True:
        try:
            instance = _Builder(operator, source, example, picks).build()
        except IllTyped:
            instance = None
        if instance is not None and instance.taken not in built:
            built.add(instance.taken)
            yield instance
        if not picks.advance():
            return


class _Picks:
    """Choices in the order they come up, gone through like an odometer: what fails at once rules out all that follows."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []  # which, of how many
        self.next = 0

    def pick(self, count: int) -> int:
        """One of `count`."""
        if self.next == len(self.made):
            self.made.append((0, count))
        self.next += 1
        return self.made[self.next - 1][0]

    def advance(self) -> bool:
        """Goes on to the next choices; whether there are any."""
        del self.made[self.next :]
        self.next = 0
        while self.made:
            which, count = self.made.pop()
            if which + 1 < count:
                self.made.append((which + 1, count))
                return True
        return False


class _Builder:
    def __init__(self, operator: FusedOp, source: Source, example: dict[str, Any], picks: _Picks) -> None:
        self.operator, self.source, self.example, self.picks = operator, source, example, picks
        self.x = (DType.FLOAT32, DType.FLOAT16)[picks.pick(2)]
        self.types: dict[str, DType] = {}  # of weights, of biases
        opset = max((NEWEST.get(node.op, 23) for node in source.nodes), default=23)
        self.graph = Graph("instance", opset)
        self.random = np.random.RandomState(0)
        self.variables: dict[str, Value] = {}
        self.nodes: dict[int, Node] = {}
        self.choice: dict[int, int] = {}
        self.taken: set[Alternative] = set()

    def build(self) -> Instance:
        arguments = {argument.name: argument for argument in self.operator.signature.inputs}
        absent = set(self.example.get("without", ()))
        for argument in arguments.values():
            if argument.name not in absent and not is_weight(argument, self.example):
                self._input(argument.name, argument)
        try:
            outputs = [self._value(pattern, None) for pattern in self.source.outputs]
        except (CheckFailed, InputError):  # shapes that do not fit
            raise IllTyped from None
        if any(value is None or value.dtype is not self.x for value in outputs):
            raise IllTyped
        wanted = self._output_shapes()
        if wanted is not None and any(
            v is not None and v.shape != shape for v, shape in zip(outputs, wanted, strict=False)
        ):
            raise IllTyped
        self._forget_unused()
        used = {STANDS_FOR.get(name, name) for name, value in self.variables.items() if value.uses}
        if "w0" not in self.variables and used & set(arguments) != set(arguments) - absent:
            raise IllTyped  # an optional argument the example has, or has not
        if self.operator.name == "attention":
            self._attention_as_wanted()
        results = [value for value in outputs if value is not None]
        if "role" in self.example:
            results += self._consumer(results)
        if self.source.reader is not None:
            results.append(self._reader(self.source.reader))
        for value in results:
            value.is_output = True
        self.graph.outputs = results
        self.graph.output_names = [value.name for value in results]
        self.graph.validate()
        inputs: dict[str, Value | list[Value]] = {STANDS_FOR.get(n, n): value for n, value in self.variables.items()}
        if "w0" in self.variables:
            parts = range(len(self.example["sizes"]))
            zeros = [self.graph.constant(Array.of(np.zeros(size), self.x)) for size in self.example["sizes"]]
            inputs = {
                "x": self.variables["x"],
                "weight": [self.variables[f"w{i}"] for i in parts],
                "bias": [self.variables.get(f"b{i}", zeros[i]) for i in parts],
            }
        taken = frozenset(self.taken)
        return Instance(self.operator, self.source, self.example, self.graph, inputs, taken)

    def _output_shapes(self) -> list[Shape] | None:
        """What the operator says its outputs are; None where the signature leaves that open."""
        if self.operator.name == "packed_linear":
            return None
        values = [self.variables.get(argument.name) for argument in self.operator.signature.inputs]
        for stands, name in STANDS_FOR.items():
            values = [
                self.variables.get(stands) if v is None and a.name == name else v
                for v, a in zip(values, self.operator.signature.inputs, strict=True)
            ]
        return self.operator.output_shapes(values, attributes_of(self.example))

    def _reader(self, reader: Result) -> Value:
        """The attention behind the outputs, on queries of its own where they are none of them."""
        k, v = (self._value(pattern, None) for pattern in reader.node.inputs[1:3])
        q = self._value(reader.node.inputs[0], None) if isinstance(reader.node.inputs[0], (Result, Either)) else None
        assert k is not None and v is not None and k.shape is not None
        if q is None:
            queries = Argument("q", ("B", "G", "S", "Dh"))
            q = self._input("q", queries)
        attributes = {
            "heads": (q.shape[1], k.shape[1]),
            "scale": 0.25,
            "softcap": 0.0,
            "guarded": False,
            "merged": False,
        }  # type: ignore[index]
        return self._add("attention", [q, k, v], attributes, FUSER)

    def _input(self, name: str, argument: Argument) -> Value:
        """An activation."""
        kind = kind_of(name, self.example)
        is_condition = name in STANDS_FOR or kind == "bool"
        value = Value(name, DType.BOOL if is_condition else self.x, shape_of(argument, self.example))
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                self.graph.dim_sources.setdefault(dim, (value, axis))
        self.graph.inputs.append(value)
        self.variables[name] = value
        return value

    def _forget_unused(self) -> None:
        """Of a mask and the condition it is made of a graph has one."""
        for name in STANDS_FOR.values():
            value = self.variables.get(name)
            if value is not None and not value.uses:
                self.graph.inputs.remove(self.variables.pop(name))
                for dim, (source, _) in list(self.graph.dim_sources.items()):
                    if source is value:
                        del self.graph.dim_sources[dim]

    def _attention_as_wanted(self) -> None:
        """Refuses a graph without the example's guard, soft-cap or scale, or with one that it has not."""
        present = {node.op for node in self.graph.nodes}
        if "attention" in present:
            return
        if "Attention" in present:
            is_float = "M" in self.example and kind_of("mask", self.example) != "bool"
            guarded = "Where" in present or not is_float
            if guarded != self.example["guarded"] or ("Max" in present) != is_float:
                raise IllTyped
            return
        if ("IsNaN" in present) != self.example["guarded"] or ("Tanh" in present) != bool(self.example["softcap"]):
            raise IllTyped
        scales = [value for name, value in self.variables.items() if name.endswith("scale")]
        if bool(scales) != (self.example["scale"] != 1):
            raise IllTyped
        for value in scales:
            assert value.dtype is not None
            value.constant = Array.of(self.example["scale"] ** (1 / len(scales)), value.dtype)

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
        if isinstance(pattern, (Either, Absent)):
            forms = (*pattern.alternatives,) if isinstance(pattern, Either) else (pattern.present, None)
            if id(pattern) not in self.choice:
                self.choice[id(pattern)] = self.picks.pick(len(forms))
            index = self.choice[id(pattern)]
            self.taken.add((id(pattern), index))
            return self._value(forms[index], like)
        if isinstance(pattern, Literal):
            return self._number(pattern.number, like)
        if isinstance(pattern, Var):
            name = pattern.name.removeprefix("key_")  # the tables of the keys are those of the queries
            if name not in self.variables:
                self.variables[name] = self._variable(name, like)
            return self.variables[name]
        if isinstance(pattern, Result):
            node = self.nodes.get(id(pattern.node)) or self._node(pattern.node)
            return node.outputs[pattern.index]
        return None

    def _number(self, number: float, dtype: DType | None) -> Value:
        stored = Array.of(number, dtype or self.x)
        if number and not stored.scalar:
            raise IllTyped  # an epsilon of 1e-12 is zero in float16
        return self.graph.constant(stored, "number")

    def _variable(self, name: str, like: DType | None) -> Value:
        arguments = {argument.name: argument for argument in self.operator.signature.inputs}
        if name in self.example.get("without", ()):
            raise IllTyped
        if name in STANDS_FOR and STANDS_FOR[name] in arguments:
            return self._input(name, arguments[STANDS_FOR[name]])
        number = self._number_of(name)
        if number is not None:
            return self._number(number, like)
        if name in arguments:
            shape = dims.concrete(shape_of(arguments[name], self.example), {})
        else:  # one of several linears
            size = self.example["sizes"][int(name[1:])]
            shape = (self.example["D"], size) if name[0] == "w" else (size,)
        kind = "bias" if name[0] == "b" else "weight"
        if kind not in self.types:
            options = (DType.FLOAT16, DType.FLOAT32) if self.x is DType.FLOAT16 else (self.x,)
            self.types[kind] = options[self.picks.pick(len(options))]
        return self.graph.constant(Array.of(self.random.standard_normal(shape), self.types[kind]), name)

    def _number_of(self, name: str) -> float | None:
        """The number a variable stands for: an attribute, or what an attribute is made of."""
        if name in ("inner", "outer"):
            if not self.example["softcap"]:
                raise IllTyped
            return float(self.example["softcap"]) ** (1 if name == "outer" else -1)
        if name == "lowest":
            return self._lowest()
        if name == "least":
            return LEAST[self.x]
        if name.endswith("scale"):
            return 1.0  # known when all factors are
        found: float | None = attributes_of(self.example).get(name)
        return found

    def _lowest(self) -> float:
        kind = kind_of("mask", self.example)
        if kind == "lowest" and any(node.op == "Where" and node.kept for node in self.source.nodes):
            return float(np.finfo(self.x.numpy).min)
        if kind != "bool":
            raise IllTyped
        return -math.inf

    def _node(self, wanted: Apply) -> Node:
        # Numbers take the type of what they meet, so they come last.
        is_number = [
            isinstance(p, Literal) or (isinstance(p, Var) and (p.scalar or p.name == "eps")) for p in wanted.inputs
        ]
        values: list[Value | None] = [None] * len(wanted.inputs)
        like: DType | None = None
        for i in sorted(range(len(values)), key=lambda i: is_number[i]):
            values[i] = value = self._value(wanted.inputs[i], like)
            if like is None and value is not None and value.dtype is not None and value.dtype.is_float:
                like = value.dtype
        self._require_operands(wanted.op, [value for value in values if value is not None])
        attributes = {
            name: self.example[value.name] if isinstance(value, Capture) else value
            for name, value in wanted.attributes.items()
        } | self._unsaid(wanted, values[0])
        node = self.graph.add(wanted.op, values, attributes, domain=wanted.domain, outputs=wanted.outputs)
        while node.inputs and node.inputs[-1] is None:
            node.inputs.pop()
        infer_node(self.graph, node)
        self.nodes[id(wanted)] = node
        return node

    def _require_operands(self, op: str, values: list[Value]) -> None:
        """What shape inference takes for granted: one type, shapes that broadcast."""
        if op == "Attention":
            heads = {value.shape[1] for value in values[1:3] if value.shape is not None}
            mask = values[3].shape if len(values) > 3 else None
            if len(heads) > 1 or (mask is not None and mask[-2:] != (dims.symbol("S"), dims.symbol("T"))):
                raise IllTyped
        is_flag = values[0].dtype is DType.BOOL
        if (op == "IsInf" and is_flag) or (op == "Cast" and values[0] is self.variables.get("mask") and not is_flag):
            raise IllTyped
        if op not in NUMERIC:
            return
        if len({value.dtype for value in values[op == "Where" :]}) > 1:
            raise IllTyped
        shapes = [value.shape[: -2 if op == "MatMul" else None][::-1] for value in values if value.shape is not None]
        for axis in range(max(map(len, shapes))):
            if len({n for shape in shapes for n in shape[axis : axis + 1] if isinstance(n, int) and n != 1}) > 1:
                raise IllTyped

    def _unsaid(self, wanted: Apply, x: Value | None) -> dict[str, Any]:
        """The attributes that a pattern leaves open."""
        if x is None or x.shape is None:
            return {}
        if wanted.op == "Cast" and "to" not in wanted.attributes:
            types = [dtype for dtype in (DType.FLOAT32, DType.FLOAT16) if dtype is not x.dtype]
            if self.x is DType.FLOAT32:
                raise IllTyped
            return {"to": types[self.picks.pick(len(types))].onnx}
        if wanted.op == "Slice":
            return {"ends": (x.shape[-1],)}
        is_table = x in (self.variables.get("cos"), self.variables.get("sin"))
        if wanted.op == "Unsqueeze" and is_table and x.rank != 3 and wanted.attributes["axes"] == (2,):
            raise IllTyped  # a table for every token has no axis of heads yet
        if wanted.op == "Split" and "sizes" in self.example:
            return {"split": self.example["sizes"]}
        if wanted.op == "Split":
            turned, rest = self.example["rotary_dim"], self.example["Dh"] - self.example["rotary_dim"]
            parts = (
                (turned, rest) if wanted.outputs == 2 and x.shape[-1] != turned else (turned // 2, turned // 2, rest)
            )
            if 0 in parts[: wanted.outputs]:
                raise IllTyped
            return {"split": parts[: wanted.outputs]}
        if wanted.op in ("Expand", "Reshape"):
            return {"shape": self._shape(wanted.op, x, x.shape)}
        return {}

    def _shape(self, op: str, x: Value, shape: Shape) -> Shape:
        """What an attention or a rotary embedding reshapes and expands to."""
        if op == "Reshape" and (len(shape) == 3 or (len(shape) == 5 and shape[-1] == 2 and "C" in self.example)):
            width = self.example["Dv"] if x is self.variables.get("v") else self.example["Dh"]
            if len(shape) == 5:
                return (*shape[:-2], dims.mul(shape[-2], 2))
            assert isinstance(shape[2], int)
            return (*shape[:2], shape[2] // width, width)
        if op == "Reshape" and x.producer is not None and x.producer.is_a("Transpose") and "merged" in self.example:
            return (*shape[:2], dims.mul(shape[2], shape[3]))
        if "heads" not in self.example or self.example["merged"]:
            raise IllTyped
        heads, groups = self.example["heads"]
        length = dims.symbol("S")
        if op == "Expand" and len(shape) < 5:  # a mask
            whole = (*shape[:-2], length, dims.symbol("T"))
            if whole == shape:
                raise IllTyped
            return whole
        if heads == groups:
            raise IllTyped
        if op == "Expand":  # each key head for each query head
            return (shape[0], groups, heads // groups, *shape[-2:])
        if len(shape) == 5:
            return (shape[0], heads, *shape[-2:])
        rows = (groups, dims.mul(heads // groups, length)) if shape[1] == heads else (heads, length)
        return (shape[0], *rows, shape[-1])
