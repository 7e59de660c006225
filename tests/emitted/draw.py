"""One of 50 candidates of every row, drawn by top-k, top-p and min-p.

Grid: (rows,). One program draws for one row: its candidates in falling order. In float32.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    values,
    indices,
    normalizer,
    u,
    temperature,
    top_k,
    top_p,
    min_p,
    token,
    logprob,
    TOP: tl.constexpr = 50,
    BLOCK_K: tl.constexpr = 64,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_K)
    value = tl.load(values + row * TOP + c, mask=c < TOP, other=float("-inf"))
    most = tl.load(top_k + row)
    most = tl.where(most > 0, most, TOP)
    first = tl.max(value, 0)
    p = tl.where(c < most, tl.exp(value - first), 0.0)
    # All of the vocabulary is the softmax's sum where top-k leaves it in.
    whole = tl.exp(tl.load(normalizer + row) - first)
    p /= tl.where(tl.load(top_k + row) > 0, tl.sum(p, 0), whole)
    before = tl.cumsum(p, 0) - p
    kept = (before < tl.load(top_p + row)) & (p >= tl.load(min_p + row) * tl.max(p, 0)) & (p > 0.0)
    p = tl.where(kept | (c == 0), p, 0.0)
    sums = tl.cumsum(p, 0)
    place = tl.load(u + row) * tl.sum(p, 0)
    chosen = tl.min(tl.where((sums > place) & (p > 0.0), c, BLOCK_K), 0)
    chosen = tl.where((tl.load(temperature + row) > 0.0) & (chosen < BLOCK_K), chosen, 0)
    tl.store(token + row, tl.load(indices + row * TOP + chosen))
    tl.store(logprob + row, tl.load(values + row * TOP + chosen) - tl.load(normalizer + row))


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(values, indices, normalizer, u, temperature, top_k, top_p, min_p, token, logprob, pdl=False):
    """Fills token and logprob; all tensors are contiguous."""
    rows = token.shape[0]
    if rows:
        kernel[(rows,)](
            values,
            indices,
            normalizer,
            u,
            temperature,
            top_k,
            top_p,
            min_p,
            token,
            logprob,
            num_warps=1,
            num_stages=1,
            **(OVERLAPPED if pdl else {}),
        )
