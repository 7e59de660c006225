"""y = silu(gate) * up over rows of 11008.

Grid: (rows, blocks of 1024 columns). One program computes one block of one row.
Gate and up may be halves of wider rows. In float32, rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def activation(x):
    """SiLU, in float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def kernel(
    gate,
    up,
    y,
    gate_stride,
    up_stride,
    F: tl.constexpr = 11008,
    BLOCK: tl.constexpr = 1024,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    g = tl.load(gate + row * gate_stride + columns, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside).to(tl.float32)
    tl.store(y + row * F + columns, activation(g) * u, mask=inside)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(gate, up, y, pdl=False):
    """Fills y [rows, F]; the rows of gate and up may be strided."""
    rows = y.shape[0]
    if rows:
        kernel[(rows, 11)](
            gate, up, y, gate.stride(0), up.stride(0), num_warps=4, num_stages=1, **(OVERLAPPED if pdl else {})
        )
