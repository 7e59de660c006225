"""Rows of 4096 of 1 table, by ids.

Grid: (tokens, 4 blocks of 1024 columns). One program copies one block of one token's row.
An id outside its table gives NaN. Sums in float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    ids0,
    table0,
    y,
    D: tl.constexpr = 4096,
    BLOCK: tl.constexpr = 1024,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros([BLOCK], tl.float32)
    id = tl.load(ids0 + token)
    known = (id >= 0) & (id < 32000)
    row = tl.where(known, id, 0).to(tl.int64)
    part = tl.load(table0 + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    total += tl.where(known, part, float("nan"))
    tl.store(y + token * D + columns, total, mask=inside)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(ids0, table0, y, pdl=False):
    """Fills y [tokens, D]."""
    tokens = y.shape[0]
    if tokens:
        kernel[(tokens, 4)](ids0, table0, y, num_warps=4, num_stages=1, **(OVERLAPPED if pdl else {}))
