"""How tensors are laid out, in one form: transposes, reshapes, slices and repetitions."""

from fuser import dims
from fuser.canonicalize.rules import become, emit, rule, sole
from fuser.content import clamp, content, slice_bounds
from fuser.dims import Dim
from fuser.graph import Graph, Node, Value
from fuser.shapes import infer_node


def _is_right_factor(value: Value) -> bool:
    """Whether a value, perhaps scaled, is only ever the right operand of matrix products."""
    return bool(value.uses) and all(
        (node.is_a("MatMul") and index == 1)
        or (
            node.is_a("Mul")
            and any(v is not None and v.scalar is not None for v in node.inputs)
            and _is_right_factor(node.output)
        )
        for node, index in value.uses
    )


@rule("Transpose")
def _transpose(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return False
    order = tuple(node.attributes.get("perm", range(len(value.shape))[::-1]))
    if order == tuple(range(len(order))):
        return become(graph, node, value)
    inner = value.producer
    swap = (*range(len(order) - 2), len(order) - 1, len(order) - 2)
    turned = len(order) > 2 and _is_right_factor(node.output)
    if turned and order != swap and order[-2] == len(order) - 1:
        # The keys of q k^T: rows arranged as the values are, then turned.
        rows = emit(graph, node, "Transpose", [value], {"perm": (*order[:-2], order[-1], order[-2])})
        return become(graph, node, emit(graph, node, "Transpose", [rows], {"perm": swap}))
    if inner is None or not inner.is_a("Transpose") or value.captured or inner.inputs[0] is None:
        return False
    if turned and order == swap and tuple(inner.attributes.get("perm", ())) != swap:
        return False
    first = tuple(inner.attributes.get("perm", range(len(order))[::-1]))
    node.attributes["perm"] = tuple(first[i] for i in order)
    graph.set_input(node, 0, inner.inputs[0])
    return True


@rule("Reshape")
def _flat_transpose(graph: Graph, node: Node) -> bool:
    """Swapping the last two axes needs no merging of the others before and splitting of them after."""
    value, shape = node.inputs[0], node.output.shape
    turn = value.producer if value is not None else None
    if turn is None or shape is None or len(node.inputs) > 1 or not turn.is_a("Transpose") or not sole(value, node):
        return False
    flat = turn.inputs[0]
    merge = flat.producer if flat is not None else None
    if merge is None or flat is None or flat.shape is None or not merge.is_a("Reshape") or len(merge.inputs) > 1:
        return False
    if (
        tuple(turn.attributes.get("perm", ())) != (0, 2, 1)
        or len(shape) < 4
        or shape[-2:] != (flat.shape[2], flat.shape[1])
    ):
        return False
    lead = shape[:-2]
    if dims.equal(dims.product(lead), flat.shape[0]) is not True:
        return False
    whole = emit(graph, merge, "Reshape", [merge.inputs[0]], {"shape": (*lead, flat.shape[1], flat.shape[2])})
    order = (*range(len(lead)), len(lead) + 1, len(lead))
    return become(graph, node, emit(graph, turn, "Transpose", [whole], {"perm": order}))


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape_chain(graph: Graph, node: Node) -> bool:
    """Only the last of several reshapes matters."""
    value, shape = node.inputs[0], node.output.shape
    inner = value.producer if value is not None else None
    if (
        inner is None
        or value is None
        or shape is None
        or value.captured
        or len(node.inputs) > 1
        or len(inner.inputs) > 1
    ):
        return False
    if inner.domain or inner.op not in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") or inner.inputs[0] is None:
        return False
    if 0 in shape or any(
        symbol not in graph.dim_sources or graph.dim_sources[symbol][0] in (value, node.output)
        for symbol in dims.symbols(shape)
    ):
        return False
    return become(graph, node, emit(graph, node, "Reshape", [inner.inputs[0]], {"shape": shape}))


@rule("Slice")
def _slice(graph: Graph, node: Node) -> bool:
    """A slice of everything is nothing; slices that partition one axis are one Split."""
    value, bounds = node.inputs[0], slice_bounds(node)
    if value is None or value.shape is None or bounds is None:
        return False
    taken = {a: (clamp(s, value.shape[a]), clamp(e, value.shape[a])) for a, (s, e, step) in bounds.items()}
    if any(None in taken[axis] or step != 1 for axis, (_, _, step) in bounds.items()):
        return False
    if all(span == (0, value.shape[axis]) for axis, span in taken.items()):
        return become(graph, node, value)
    if len(taken) != 1 or content(value) is not None:  # parts of a shape become the dims they hold
        return False
    ((axis, _),) = taken.items()
    parts: dict[tuple[Dim, Dim], Node] = {}
    for user in value.consumers:
        other = slice_bounds(user) if user.is_a("Slice") and user.inputs[0] is value else None
        if other is None or set(other) != {axis} or other[axis][2] != 1 or user.output.captured:
            continue
        start, end = (clamp(bound, value.shape[axis]) for bound in other[axis][:2])
        if start is not None and end is not None and start != end:
            parts.setdefault((start, end), user)
    order = _partition(list(parts), value.shape[axis])
    if order is None:
        return False
    whole = graph.add(
        "Split",
        [value],
        {"axis": axis - len(value.shape), "split": tuple(dims.sub(end, start) for start, end in order)},
        outputs=[parts[span].output.name for span in order],
        like=parts[order[0]],
    )
    infer_node(graph, whole)
    for span, part in zip(order, whole.outputs, strict=True):
        become(graph, parts[span], part)
    return True


def _partition(spans: list[tuple[Dim, Dim]], size: Dim) -> list[tuple[Dim, Dim]] | None:
    """The spans in order when they tile [0, size) exactly, each once."""
    if len(spans) < 2 or not all(isinstance(x, int) for span in spans for x in span):
        return None
    order = sorted(spans)
    ends = [0, *(end for _, end in order)]
    return (
        order if ends[-1] == size and all(start == end for (start, _), end in zip(order, ends, strict=False)) else None
    )


@rule("Cos", "Sin", "Cast", "Mul", "Unsqueeze", "Neg")
def _above_repetition(graph: Graph, node: Node) -> bool:
    """What is done to a value concatenated with itself is done once, before."""
    index = next((i for i, v in enumerate(node.inputs) if v is not None and v.constant is None), 0)
    value = node.inputs[index]
    repeat = value.producer if value is not None else None
    if repeat is None or value is None or value.captured or not repeat.is_a("Concat") or len(repeat.inputs) < 2:
        return False
    part = repeat.inputs[0]
    if part is None or any(v is not part for v in repeat.inputs) or repeat.attributes.get("axis") != -1:
        return False
    others = [v for i, v in enumerate(node.inputs) if i != index]
    if any(v is None or v.scalar is None for v in others) or (
        node.op == "Unsqueeze" and -1 in node.attributes.get("axes", (-1,))
    ):
        return False
    if (
        part.shape is None
        or node.output.shape is None
        or any(v is not None and len(v.shape or ()) > len(part.shape) for v in others)
    ):
        return False
    if node.op == "Unsqueeze" and any(axis >= len(part.shape) for axis in node.attributes["axes"]):
        return False
    inputs = [part if i == index else v for i, v in enumerate(node.inputs)]
    once = emit(graph, node, node.op, inputs, dict(node.attributes))
    return become(graph, node, emit(graph, node, "Concat", [once] * len(repeat.inputs), {"axis": -1}))
