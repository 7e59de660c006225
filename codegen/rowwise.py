"""Row-wise kernels: norms, norms of a residual sum, activation x gate; one pass over memory, statistics in float32."""

from fuser.codegen.kernel import LONGEST_ROW, Emitter, Kernel, activated, element, power_of_two
from fuser.errors import UsageError


def norm(
    kind: str,
    D: int,
    *,
    eps: float,
    dtype: str = "bf16",
    skip: bool = False,
    weight: bool = True,
    bias: bool = False,
    num_warps: int | None = None,
) -> Kernel:
    """A kernel of rms_norm or layer_norm (`kind` "rms" or "layer") over rows of D; with `skip`, of a sum of two.

    launch(x, [skip,] [weight,] [bias,] y[, total]): x, skip, y, total [*B, D] contiguous, of `dtype`; weight, bias [D].

    Raises:
        UsageError: another kind, another dtype, a row longer than a program can hold.
    """
    if kind not in ("rms", "layer"):
        raise UsageError(f"codegen: a norm is rms or layer, not {kind}")
    if not 0 < D <= LONGEST_ROW:
        raise UsageError(f"codegen: a row of a norm has 1 to {LONGEST_ROW} elements, not {D}")
    BLOCK = power_of_two(D)
    what = "RMSNorm" if kind == "rms" else "LayerNorm"
    name = f"{'skip_' if skip else ''}{kind}_norm"
    e = Emitter(
        name,
        f"{what} of rows of {D}{' of x + skip, and that sum' if skip else ''}.",
        (
            "Grid: (rows,). One program holds one row in registers: it is read once and written once.",
            "Statistics and scaling in float32, rounded once" + (" after the sum is." if skip else "."),
        ),
        {"num_warps": num_warps or min(max(BLOCK // 512, 1), 16), "num_stages": 1},
    )
    tensors = ["x", *["skip"] * skip, *["weight"] * weight, *["bias"] * bias, "y", *["total"] * skip]
    for tensor in tensors:
        e.pointer(tensor, element(dtype))
    e.constant(D=D, EPS=eps, BLOCK=BLOCK)
    e.begin(waits=True)
    e.add("start = tl.program_id(0).to(tl.int64) * D", "columns = tl.arange(0, BLOCK)")
    mask = other = ""
    if BLOCK != D:
        e.add("inside = columns < D")
        mask, other = ", mask=inside", ", mask=inside, other=0.0"
    e.add(f"row = tl.load(x + start + columns{other}).to(tl.float32)")
    if skip:
        e.add(
            f"row += tl.load(skip + start + columns{other}).to(tl.float32)",
            "row = row.to(total.dtype.element_ty)  # the norm is of the sum as it is kept",
            f"tl.store(total + start + columns, row{mask})",
            "row = row.to(tl.float32)",
        )
    if kind == "layer":
        e.add("row -= tl.sum(row, 0) / D")
        if mask:
            e.add("row = tl.where(inside, row, 0.0)")
    e.add("row *= tl.rsqrt(tl.sum(row * row, 0) / D + EPS)")
    if weight:
        e.add(f"row *= tl.load(weight + columns{other}).to(tl.float32)")
    if bias:
        e.add(f"row += tl.load(bias + columns{other}).to(tl.float32)")
    e.add(f"tl.store(y + start + columns, row{mask})")
    outputs = "y and total" if skip else "y"
    e.host += [
        f"def launch({', '.join(tensors)}, pdl=False):",
        f'    """Fills {outputs}; rows are contiguous."""',
        f"    rows = x.numel() // {D!r}",
        "    if rows:",
        f"        {e.launched('(rows,)', *tensors)}",
    ]
    return e.kernel()


def gate(F: int, *, activation: str, dtype: str = "bf16", BLOCK: int = 1024, num_warps: int = 4) -> Kernel:
    """A kernel of gated_mlp: activation(gate) * up.

    launch(gate, up, y): gate, up [rows, F] with any row stride (halves of one product), y [rows, F] contiguous.

    Raises:
        UsageError: another activation or dtype.
    """
    BLOCK = min(BLOCK, power_of_two(F))
    e = Emitter(
        "gate",
        f"y = {activation}(gate) * up over rows of {F}.",
        (
            f"Grid: (rows, blocks of {BLOCK} columns). One program computes one block of one row.",
            "Gate and up may be halves of wider rows. In float32, rounded once.",
        ),
        {"num_warps": num_warps, "num_stages": 1},
    )
    activated(e, activation)
    for tensor in ("gate", "up", "y"):
        e.pointer(tensor, element(dtype))
    e.integer("gate_stride")
    e.integer("up_stride")
    e.constant(F=F, BLOCK=BLOCK)
    e.begin(waits=True)
    e.add("row = tl.program_id(0).to(tl.int64)", "columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)")
    mask = ""
    if F % BLOCK:
        e.add("inside = columns < F")
        mask = ", mask=inside"
    e.add(
        f"g = tl.load(gate + row * gate_stride + columns{mask}).to(tl.float32)",
        f"u = tl.load(up + row * up_stride + columns{mask}).to(tl.float32)",
        f"tl.store(y + row * F + columns, activation(g) * u{mask})",
    )
    grid = f"(rows, {-(-F // BLOCK)!r})"
    e.host += [
        "def launch(gate, up, y, pdl=False):",
        '    """Fills y [rows, F]; the rows of gate and up may be strided."""',
        "    rows = y.shape[0]",
        "    if rows:",
        f"        {e.launched(grid, 'gate', 'up', 'y', 'gate.stride(0)', 'up.stride(0)')}",
    ]
    return e.kernel()
