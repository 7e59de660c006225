"""Equal computations become one (common subexpressions), and equal small constants one."""

from typing import Any

from fuser.canonicalize.rules import IMPURE, PURE_DOMAINS
from fuser.constants import Constant
from fuser.content import CONTENT_LIMIT
from fuser.dtypes import DType
from fuser.graph import Graph, Node, Origin, Value


def share(graph: Graph) -> int:
    """Makes equal computations one (common subexpressions), and equal small constants one."""
    constants: dict[Any, Value] = {}
    number: dict[int, int] = {}
    shared = 0

    def key_of(value: Value | None) -> Any:
        if (
            value is None
            or value.constant is None
            or value.constant.size > CONTENT_LIMIT
            or not value.constant.is_known
            or value.dtype is DType.STRING
        ):
            return id(value)
        if id(value) not in number:
            data = value.constant.numpy()
            number[id(value)] = id(constants.setdefault((value.dtype, data.shape, data.tobytes()), value))
        return number[id(value)]

    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op in IMPURE or node.domain not in PURE_DOMAINS or node.carried or node.captures:
            continue
        attributes = tuple((k, id(v) if isinstance(v, Constant) else v) for k, v in sorted(node.attributes.items()))
        # An output left out cannot be read in another's place.
        present = tuple(bool(value.name) for value in node.outputs)
        key = (node.op, node.domain, attributes, tuple(map(key_of, node.inputs)), present)
        first = seen.setdefault(key, node)
        if first is node or any(value.captured for value in node.outputs):
            continue
        if any(a.is_output and b.is_output for a, b in zip(first.outputs, node.outputs, strict=True)):
            continue
        first.origin = Origin.union((first.origin, node.origin))
        for old, new in zip(node.outputs, first.outputs, strict=True):
            graph.replace(old, new)
        graph.remove(node)
        shared += 1
    return shared
