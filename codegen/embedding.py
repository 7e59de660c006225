"""Embedding: rows of a table by token ids, the sum of several tables' rows, perhaps scaled."""

from dataclasses import dataclass

from fuser.codegen.kernel import Emitter, Kernel, element, power_of_two
from fuser.errors import UsageError

TILE = 1024


@dataclass(frozen=True)
class Embedding:
    """What an embedding kernel computes: y[t] = (sum of table_i[ids_i[t]]) * scale, tables [rows_i, D].

    An id outside its table gives a row of NaN: what is wrong is seen, and nothing else is read.
    """

    D: int
    rows: tuple[int, ...]  # of each table
    scale: float = 1.0
    dtype: str = "bf16"


def embedding(what: Embedding, *, num_warps: int = 4) -> Kernel:
    """The kernel of `what`: launch(ids0, table0, [ids1, table1, ...,] y): ids [tokens] int32, tables and y contiguous.

    Raises:
        UsageError: no table, another dtype.
    """
    if not what.rows:
        raise UsageError("codegen: an embedding has a table")
    BLOCK = min(TILE, power_of_two(what.D))
    blocks = -(-what.D // BLOCK)
    e = Emitter(
        "embedding",
        f"Rows of {what.D} of {len(what.rows)} table{'s' * (len(what.rows) > 1)}, by ids"
        + (f", times {what.scale!r}." if what.scale != 1.0 else "."),
        (
            f"Grid: (tokens, {blocks} blocks of {BLOCK} columns). One program copies one block of one token's row.",
            "An id outside its table gives NaN. Sums in float32, rounded once.",
        ),
        {"num_warps": num_warps, "num_stages": 1},
    )
    tensors = [name for i in range(len(what.rows)) for name in (f"ids{i}", f"table{i}")] + ["y"]
    for name in tensors:
        e.pointer(name, "i32" if name.startswith("ids") else element(what.dtype))
    e.constant(D=what.D, BLOCK=BLOCK)
    e.begin(waits=True)
    e.add("token = tl.program_id(0).to(tl.int64)", "columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)")
    e.add("inside = columns < D", "total = tl.zeros([BLOCK], tl.float32)")
    for i, rows in enumerate(what.rows):
        e.add(
            f"id = tl.load(ids{i} + token)",
            f"known = (id >= 0) & (id < {rows!r})",
            "row = tl.where(known, id, 0).to(tl.int64)",
            f"part = tl.load(table{i} + row * D + columns, mask=inside, other=0.0).to(tl.float32)",
            'total += tl.where(known, part, float("nan"))',
        )
    if what.scale != 1.0:
        e.add(f"total *= {what.scale!r}")
    e.add("tl.store(y + token * D + columns, total, mask=inside)")
    e.host += [
        f"def launch({', '.join(tensors)}, pdl=False):",
        '    """Fills y [tokens, D]."""',
        "    tokens = y.shape[0]",
        "    if tokens:",
        f"        {e.launched(f'(tokens, {blocks!r})', *tensors)}",
    ]
    return e.kernel()
