"""What a diff says first: operators, launches of a layer, bytes that a token moves, weights, and the verified error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from fuser import dims
from fuser.codegen.plan import VIEWS, at, plan
from fuser.diff.alignment import Stands
from fuser.diff.document import Row
from fuser.diff.folding import Folding
from fuser.diff.structure import Structure
from fuser.errors import FuserError
from fuser.fused import REGISTRY
from fuser.graph import FUSER, Graph, Node, Value
from fuser.layers import Layers
from fuser.report import Report, size

CONTEXT = 1024  # tokens in the cache for which bytes are told
KNOWN = 0.9  # of the operators must have known sizes for bytes to be told


@dataclass
class Sizes:
    """The sizes of a graph's dims in a decode step of one token, its cache at `CONTEXT` tokens."""

    graph: Graph

    def __post_init__(self) -> None:
        inputs = [value for value in self.graph.inputs if value.shape is not None]
        tokens = next((v for v in inputs if v.dtype is not None and v.dtype.is_integer), None)
        step = dims.symbols(tokens.shape or ()) if tokens is not None else set()
        symbols = {symbol for value in inputs for symbol in dims.symbols(value.shape or ())}
        self.of: dict[sympy.Symbol, int] = {symbol: 1 if symbol in step else CONTEXT for symbol in symbols}
        self.known: dict[Any, int | None] = {}

    def bytes(self, value: Value) -> int | None:
        """The bytes of a value; None where its type or a size is not known."""
        if value.constant is not None:
            return value.constant.stored_bytes
        if value.dtype is None or value.shape is None or not value.dtype.bits:
            return None
        key = (value.dtype, value.shape)
        if key not in self.known:
            try:
                count = math.prod(dims.concrete(value.shape, self.of))
                self.known[key] = -(-count * value.dtype.bits // 8)
            except ValueError:
                self.known[key] = None
        return self.known[key]


def computes(node: Node) -> bool:
    """Whether an operator does work on a device: moves of data that a kernel sees through and arithmetic of sizes do not."""
    if (node.op in VIEWS and not node.domain) or node.is_a("Dims", FUSER) or node.op in ("Shape", "Constant"):
        return False
    return not all(value.content is not None for value in node.outputs) and any(
        value is not None and value.constant is None for value in node.inputs
    )


def moved(node: Node, sizes: Sizes) -> int | None:
    """Bytes that an operator reads and writes by itself; of a table that is indexed, the rows."""
    read = [
        value for value in dict.fromkeys(node.inputs[1:] if node.is_a("Gather") else node.inputs) if value is not None
    ]
    rows = node.outputs if node.is_a("Gather") else []
    amounts = [sizes.bytes(value) for value in (*read, *rows, *node.outputs)]
    return sum(amount for amount in amounts if amount is not None) if None not in amounts else None


def token_bytes(structure: Structure, sizes: Sizes) -> int | None:
    """Bytes of a decode step of one token, each operator by itself; None where too little is known."""
    amounts = [moved(node, sizes) for node in structure.nodes if computes(node)]
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if amounts and len(known) >= KNOWN * len(amounts) else None


def saving(region: Stands, before: Structure, after: Structure, sizes: Sizes) -> str:
    """What a region no longer writes and reads again, and the launches that it saves."""
    inside = {before.nodes[number] for number in region.before}
    total = 0
    for node in inside:
        if not computes(node):
            continue
        for value in node.outputs:
            if value.uses and not value.pinned and all(reader in inside for reader in value.consumers):
                total += 2 * (sizes.bytes(value) or 0)
    launches = sum(map(computes, inside)) - sum(computes(after.nodes[number]) for number in region.after)
    words = [f"{size(total)} a token"] if total else []
    words += [f"{launches} launch{'es' if launches != 1 else ''}"] if launches > 0 else []
    return ", ".join(words)


def summary(
    before: Structure, after: Structure, sizes: tuple[Sizes, Sizes], folding: Folding, layers: Layers, report: Report | None
) -> list[Row]:  # fmt: skip
    """The rows of the summary; what is not known is left out."""
    rows = [_counted("operators", len(before.nodes), len(after.nodes))]
    planned = None if report is None else _planned(after, sizes[1], layers, folding)
    usual = max(folding.runs, key=len, default=[])
    if usual:
        first = sum(computes(before.nodes[number]) for number in folding.members[0][usual[0]])
        second = sum(computes(after.nodes[number]) for number in folding.members[1][usual[0]])
        layers_in = len(folding.units[usual[0]])
        second = planned[0].get(usual[0], 0) if planned else second
        label = "launches a layer" if planned else "operators a layer"
        row = _counted(label, round(first / layers_in), round(second / layers_in))
        rows.append(row._replace(note=f"{row.note}; operators, then planned kernels") if planned else row)
    first_bytes, second_bytes = token_bytes(before, sizes[0]), token_bytes(after, sizes[1])
    second_bytes = planned[1] if planned and planned[1] is not None else second_bytes
    if first_bytes and second_bytes:
        context = f", {CONTEXT} in the cache" if CONTEXT in sizes[0].of.values() else ""
        note = f"one token{context}; {_change(first_bytes, second_bytes)}"
        rows.append(Row("bytes a token", size(first_bytes), size(second_bytes), note))
    weights = _weights(before.graph), _weights(after.graph)
    rows.append(Row("weights", size(weights[0]), size(weights[1]), _change(*weights)))
    if report is not None:
        found = report.verification
        worst = found.max_relative_error
        verified = worst is not None and not found.skipped
        rows.append(
            Row("verified error", "", f"{worst:.1e}" if verified else "not compared", found.skipped if not verified else
                f"relative, of {', '.join(found.cases)}")
        )  # fmt: skip
    return rows


def _counted(label: str, before: int, after: int) -> Row:
    return Row(label, f"{before:,}", f"{after:,}", _change(before, after))


def _change(before: int, after: int) -> str:
    if before == after or not before:
        return "the same" if before == after else ""
    percent = 100 * (after - before) / before
    return f"{percent:+.0f}%" if abs(percent) >= 0.5 else f"{percent:+.1g}%"


def _weights(graph: Graph) -> int:
    distinct = {id(value.constant): value.constant for value in graph.constants() if value.constant is not None}
    return sum(constant.stored_bytes for constant in distinct.values())


def _planned(
    after: Structure, sizes: Sizes, layers: Layers, folding: Folding
) -> tuple[dict[int, int], int | None] | None:
    """Of a graph with fused nodes, the launches of each layer and the bytes of all, as kernels are planned."""
    if not any(node.domain == FUSER and node.op in REGISTRY for node in after.nodes):
        return None
    try:
        launches = plan(after.graph)
    except FuserError:
        return None
    index = {layer: number for number, unit in enumerate(folding.units) for layer in unit}
    counts: dict[int, int] = {}
    for launch in launches:
        main = [node for role, node in launch.parts if role == "main"]
        layer = layers.of(main[0].origin.sources)
        if layer is not None:
            counts[index[layer]] = counts.get(index[layer], 0) + 1
    names = {str(symbol): number for symbol, number in sizes.of.items()}
    amounts: Sequence[int | None] = [at(launch.bytes, names) for launch in launches]
    known = [amount for amount in amounts if amount is not None]
    return counts, sum(known) if len(known) >= KNOWN * len(amounts) else None
