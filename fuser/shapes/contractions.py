"""Matrix products and attention."""

from fuser import dims
from fuser.dims import Dim
from fuser.graph import MICROSOFT, Graph, Node
from fuser.shapes.table import Inferred, broadcast, dtype_of, rule, shapes_of


@rule("MatMul")
def _matmul(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    if shapes is None or not shapes[0] or not shapes[1]:
        return [(dtype_of(node), None)]
    a, b = shapes
    batch = broadcast(a[:-2], b[:-2]) if a[:-2] or b[:-2] else ()
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return [(dtype_of(node), (*batch, *rows, *columns))]


@rule("Gemm")
def _gemm(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node, 0, 1)
    if shapes is None:
        return [(dtype_of(node), None)]
    rows = shapes[0][1 if node.attributes.get("transA") else 0]
    columns = shapes[1][0 if node.attributes.get("transB") else 1]
    return [(dtype_of(node), (rows, columns))]


@rule("Attention")
def _attention(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node, 0, 1, 2)
    if shapes is None:
        return [(dtype_of(node), None)] * 4
    q, k, v = shapes
    past = node.input(4)
    if len(q) == 3:
        heads, groups = node.attributes["q_num_heads"], node.attributes["kv_num_heads"]
        width = dims.floordiv(v[2], groups)
        result: tuple[Dim | None, ...] = (q[0], q[1], dims.mul(heads, width))
        new, key_width = k[1], dims.floordiv(k[2], groups)
    else:
        heads, groups, width = q[1], k[1], v[3]
        result = (q[0], heads, q[2], width)
        new, key_width = k[2], k[3]
    length: Dim | None = new
    if past is not None:
        length = dims.add(past.shape[2], new) if past.shape is not None else None
    rows = q[1] if len(q) == 3 else q[2]
    return [
        (dtype_of(node), result),
        (dtype_of(node), (q[0], groups, length, key_width)),
        (dtype_of(node), (q[0], groups, length, width)),
        (dtype_of(node), (q[0], heads, rows, length)),
    ]


@rule("GroupQueryAttention", domain=MICROSOFT)
def _group_query_attention(graph: Graph, node: Node) -> list[Inferred]:
    """Of queries, keys and values apart, appended to a past that is no shared buffer."""
    shapes, key, past = shapes_of(node, 0), node.input(1), node.input(3)
    if shapes is None or key is None or key.shape is None or past is None or past.shape is None:
        return [(dtype_of(node), None)] * len(node.outputs)
    length = dims.add(past.shape[2], key.shape[1])
    present: tuple[Dim, ...] = (*past.shape[:2], length, past.shape[3])
    return [(dtype_of(node), shapes[0]), (dtype_of(node), present), (dtype_of(node), present)]
