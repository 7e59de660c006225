"""What a graph's inputs are in a step over pages: token ids, positions, and padding, which pages have none of."""

from collections.abc import Mapping

import sympy

from fuser import dims
from fuser.codegen.arrangement import Tokens
from fuser.dims import Dim
from fuser.errors import UnsupportedOperator
from fuser.graph import FUSER, Graph, Node, Value
from fuser.shapes import infer


def inputs_of(graph: Graph) -> dict[Value, str]:
    """What the graph's inputs are for: token ids choose rows of a table that has as many as there are logits, or the most.

    What else chooses rows of a table are positions; of others, the nodes that read them tell.
    """
    rows: dict[Value, int] = {}
    found = dict.fromkeys(graph.inputs, "")
    for node in graph.nodes:
        table, (index, ahead) = node.input(0), shifted(node.input(1))
        if node.is_a("Gather") and index in found and table is not None and table.constant is not None:
            found[index] = "positions"
            if not ahead:
                rows[index] = max(table.constant.shape[0], rows.get(index, 0))
    widths = {value.shape[-1] for value in graph.outputs if value.shape}
    if rows:
        found[max(rows, key=lambda value: (rows[value] in widths, rows[value]))] = "tokens"
    return found


def tokens_of(inputs: Mapping[Value, str]) -> Tokens:
    """The dims that count tokens: those of the token ids."""
    for value, kind in inputs.items():
        if kind == "tokens" and value.shape is not None and len(value.shape) == 2:
            batch, sequence = value.shape
            if isinstance(batch, int) or isinstance(sequence, int):
                shape = dims.text(value.shape)
                raise UnsupportedOperator(
                    f"no step over pages: '{value.name}' {shape} does not take any number of tokens"
                )
            return Tokens(batch, sequence)
    raise UnsupportedOperator("no step over pages: no input [batch, sequence] holds token ids")


def is_integer(node: Node) -> bool:
    """Whether a node computes no floats. Who reads what it makes has to know what that is: positions, a mask."""
    return all(value.dtype is not None and not value.dtype.is_float for value in node.outputs)


def shifted(value: Value | None) -> tuple[Value | None, int]:
    """What integers are, but for their type and dims and a number that is added: (those, the number)."""
    ahead = 0
    while value is not None and (node := value.producer) is not None:
        if node.op in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
            value = node.inputs[0]
        elif node.is_a("Add") and (added := [v.scalar for v in node.inputs if v is not None and v.scalar is not None]):
            value = next((v for v in node.inputs if v is not None and v.scalar is None), None)
            ahead += int(added[0])
        else:
            break
    return value, ahead


def past_of(graph: Graph) -> Dim:
    """How many tokens the caches hold before a step."""
    for node in graph.nodes:
        if node.domain == FUSER and node.op in ("rotary_cache_write", "cache_write"):
            past = node.inputs[-2]
            if past is not None and past.shape is not None:
                return past.shape[2]
    return 0


def without_padding(graph: Graph, total: Dim) -> None:
    """Says of masks of padding that they are as long as past and new tokens together: pages hold sequences without any."""
    paddings = {"attention_mask": 1, "position_ids": 2}
    for node in graph.nodes:
        padding = node.input(paddings[node.op]) if node.domain == FUSER and node.op in paddings else None
        length = padding.shape[-1] if padding is not None and padding.shape else None
        if isinstance(length, sympy.Symbol) and length not in dims.symbols([total]):
            graph.learned[length] = total
    while graph.learn():
        infer(graph)
