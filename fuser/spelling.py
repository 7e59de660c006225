"""ONNX's spelling of a node, and ours.

Over the opsets ONNX moved parameters (axes, split, Slice's bounds) from attributes to inputs. In the graph they are
attributes as soon as they are known, with symbolic dims where they depend on the inputs' sizes: `absorb` reads them in,
`spell` writes them out for one opset, computing the dims that are not constant from the inputs' own shapes.
"""

from typing import Any

import sympy

from fuser import dims
from fuser.constants import Array
from fuser.content import parameter
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.graph import FUSER, Graph, Node, Value
from fuser.shapes import infer_node

REDUCTIONS = frozenset(
    {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum",
     "ReduceLogSumExp", "ReduceSum"}
)  # fmt: skip
# operator -> (parameter, input index, first opset in which it is an input)
PARAMETERS: dict[str, tuple[tuple[str, int, int], ...]] = {
    **dict.fromkeys(REDUCTIONS, (("axes", 1, 18),)),
    "ReduceSum": (("axes", 1, 13),),
    "Squeeze": (("axes", 1, 13),),
    "Unsqueeze": (("axes", 1, 13),),
    "Split": (("split", 1, 13),),
    "Slice": (("starts", 1, 10), ("ends", 2, 10), ("axes", 3, 10), ("steps", 4, 10)),
    "Reshape": (("shape", 1, 5),),
    "Expand": (("shape", 1, 8),),
    "Tile": (("repeats", 1, 6),),
    "ConstantOfShape": (("shape", 0, 9),),
}


def absorb(graph: Graph, node: Node) -> bool:
    """Turns a node's known parameter inputs into attributes; whether anything changed."""
    rows = PARAMETERS.get(node.op, ()) if not node.domain else ()
    present = [row for row in rows if node.input(row[1]) is not None]
    if not present:
        return False
    found = {name: parameter(node, name, index) for name, index, _ in present}
    if any(value is None for value in found.values()):
        return False
    if node.op == "Reshape":
        found["shape"] = _resolved(graph, node, found["shape"])
        if found["shape"] is None:
            return False
        node.attributes.pop("allowzero", None)
    node.attributes.update(found)
    graph.drop_inputs(node, present[0][1])
    graph.measure(node)
    return True


def _resolved(graph: Graph, node: Node, wanted: Shape) -> Shape | None:
    """A Reshape's target with 0 and -1 replaced by the dims they stand for; None where that cannot be spelled again.

    A computed dim is taken for a size, even where it is 0 at run time and there is no allowzero, which would make that 0
    say "keep": of all that exporters write, only an error becomes a tensor by it.
    """
    shape = node.output.shape
    if shape is None or 0 in shape or (0 in wanted and node.attributes.get("allowzero", 0)):
        return None
    # A dim that is known only from the result itself is spelled as -1, and then no other can be computed.
    own = [dim for dim in shape if _is_own(graph, node, dim)]
    return shape if not own or len(_computed(node.inputs[0], shape)) == 1 else None


def _is_own(graph: Graph, node: Node, dim: Dim) -> bool:
    return any(graph.dim_sources[symbol][0] is node.output for symbol in dims.symbols([dim]))


def _kept(value: Value | None, wanted: Shape) -> list[int]:
    """The axes along which a Reshape keeps a dim that is no number."""
    source = value.shape if value is not None and value.shape is not None else ()
    return [
        axis
        for axis, dim in enumerate(wanted)
        if not isinstance(dim, int) and axis < len(source) and dim == source[axis]
    ]


def _computed(value: Value | None, wanted: Shape) -> list[int]:
    """The axes whose dims are neither numbers nor kept."""
    kept = _kept(value, wanted)
    return [axis for axis, dim in enumerate(wanted) if not isinstance(dim, int) and axis not in kept]


class Spelling:
    """Writes parameters out as inputs, sharing one computation of each dim."""

    def __init__(self, graph: Graph, *, any_rank: bool = False) -> None:
        self.graph = graph
        self.any_rank = any_rank  # the ranks known are those of one call among several
        self._constants: dict[Any, Value] = {}
        self._elements: dict[Dim, Value] = {}
        self._vectors: dict[Shape, Value] = {}
        self._at: Node | None = None

    def spell(self) -> None:
        """Rewrites every node into the graph's opset."""
        for node in list(self.graph.nodes):
            self._at = node
            if node.domain == FUSER:
                self._own_notation(node)
            else:
                self._parameters(node)
        self.graph.prune()
        self.graph.sort()

    def _add(
        self, op: str, inputs: list[Value | None], attributes: dict[str, Any] | None = None, stem: str = "dims"
    ) -> Value:
        node = self.graph.add(op, inputs, attributes, outputs=[stem], like=self._at)
        infer_node(self.graph, node)
        self._parameters(node)
        return node.output

    def _own_notation(self, node: Node) -> None:
        if node.op == "Rsqrt":
            root = self._add("Sqrt", list(node.inputs), stem=f"{node.output.name}_sqrt")
            node.op, node.domain = "Reciprocal", ""
            self.graph.set_input(node, 0, root)
        elif node.op == "Dims":
            wanted = node.attributes["dims"]
            self.graph.replace(node.output, self.vector(wanted) if isinstance(wanted, tuple) else self.scalar(wanted))
            self.graph.remove(node)

    def _parameters(self, node: Node) -> None:
        rows = PARAMETERS.get(node.op, ()) if not node.domain else ()
        self._reductions(node)
        for name, index, since in rows:
            if name not in node.attributes or self.graph.opset < since:
                continue
            wanted = node.attributes.pop(name)
            if node.op == "Reshape":
                wanted = self._reshape_target(node, wanted)
            while len(node.inputs) <= index:
                node.inputs.append(None)
            self.graph.set_input(node, index, self.vector(wanted))

    def _reductions(self, node: Node) -> None:
        """Counts the axes of a reduction from the front: of an empty tensor, ONNX Runtime reduces none that is negative."""
        value, axes = node.input(0), node.attributes.get("axes")
        rank = value.rank if value is not None and not self.any_rank else None
        if node.op in REDUCTIONS and axes is not None and rank:
            node.attributes["axes"] = tuple(axis % rank for axis in axes)

    def _reshape_target(self, node: Node, wanted: Shape) -> Shape:
        """A Reshape's target with nothing computed where that can be: 0 keeps a dim in place, one -1 takes the rest."""
        kept, computed = _kept(node.inputs[0], wanted), _computed(node.inputs[0], wanted)
        own = any(_is_own(self.graph, node, wanted[axis]) for axis in computed)
        # Beside a dim that may be 0 (an empty past), -1 stands for nothing.
        if 0 not in wanted and (not computed or own or (len(computed) == 1 and not kept)):
            return tuple(0 if axis in kept else -1 if axis in computed else dim for axis, dim in enumerate(wanted))
        if self.graph.opset >= 14:
            node.attributes["allowzero"] = 1
        return wanted

    def constant(self, data: int | tuple[int, ...]) -> Value:
        """An int64 constant, shared by all who ask for the same."""
        if data not in self._constants:
            self._constants[data] = self.graph.constant(Array.of(data, DType.INT64), "dims")
        return self._constants[data]

    def vector(self, wanted: Shape) -> Value:
        """An int64 vector holding `wanted`."""
        if all(isinstance(dim, int) for dim in wanted):
            return self.constant(tuple(int(dim) for dim in wanted))
        if wanted not in self._vectors:
            parts: list[Value | None] = []
            ints: list[int] = []
            for dim in wanted:
                if isinstance(dim, int):
                    ints.append(dim)
                    continue
                if ints:
                    parts.append(self.constant(tuple(ints)))
                    ints = []
                parts.append(self.element(dim))
            if ints:
                parts.append(self.constant(tuple(ints)))
            only = parts[0]
            self._vectors[wanted] = only if len(parts) == 1 and only else self._add("Concat", parts, {"axis": 0})
        return self._vectors[wanted]

    def scalar(self, dim: Dim) -> Value:
        """An int64 scalar holding `dim`."""
        return self.constant(dim) if isinstance(dim, int) else self._add("Squeeze", [self.element(dim)], {"axes": (0,)})

    def element(self, dim: Dim) -> Value:
        """An int64 vector of one element holding `dim`, computed from the shapes of the values that have its symbols."""
        if isinstance(dim, int):
            return self.constant((dim,))
        if dim not in self._elements:
            self._elements[dim] = self._compute(dim)
        return self._elements[dim]

    def _compute(self, dim: sympy.Expr) -> Value:
        if dim.is_Symbol:
            value, axis = self.graph.dim_sources[dim]
            if self.graph.opset >= 15:
                return self._add("Shape", [value], {"start": axis, "end": axis + 1})
            return self._add("Gather", [self._add("Shape", [value]), self.constant((axis,))], {"axis": 0})
        above, below = sympy.fraction(sympy.together(dim.args[0] if isinstance(dim, sympy.floor) else dim))
        if below != 1:  # without a floor, it divides evenly
            return self._add("Div", [self.element(dims.plain(above)), self.element(dims.plain(below))])
        if dim.is_Pow and dim.exp.is_Integer and dim.exp > 0:
            factors = [dim.base] * int(dim.exp)
        else:
            factors = list(dim.as_ordered_terms() if dim.is_Add else dim.args)
        op = {sympy.Add: "Add", sympy.Mul: "Mul", sympy.Pow: "Mul", sympy.Min: "Min", sympy.Max: "Max"}[dim.func]
        total = self.element(dims.plain(factors[0]))
        for factor in factors[1:]:
            total = self._add(op, [total, self.element(dims.plain(factor))])
        return total


__all__ = ["PARAMETERS", "Spelling", "absorb"]
