"""The small-M linear family: y = epilogue(prologue(x) W^T) for up to 64 rows, each weight read once.

At so few rows a product is bound by the bytes of its weight, so a program streams whole rows of W past all rows of x. A norm
before it costs no pass of its own: y = rstd * ((x * gain) W^T), and the sum of squares is taken along the way.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from fuser.codegen.source import Source

ROWS = 64  # the most rows of x that one launch takes

Activation = Literal["silu", "gelu", "gelu_tanh"]

# Each as one expression over a float32 tile `{0}`.
ACTIVATIONS = {
    "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
}


@dataclass(frozen=True)
class Linear:
    """What one launch of the family computes.

    `norm`: x is RMS-normalised first. `activation`: of y, or, if `gated`, of its first half, which the second half is
    multiplied by. `bias` and `residual` are added, the latter last.
    """

    norm: bool = False
    bias: bool = False
    activation: Activation | None = None
    gated: bool = False
    residual: bool = False

    def __str__(self) -> str:
        x = "rms_norm(x)" if self.norm else "x"
        product = f"{x} W^T" + (" + bias" if self.bias else "")
        residual = " + residual" if self.residual else ""
        if self.gated:
            return f"y = {self.activation}(gate) * up{residual}, [gate, up] = {product}"
        return f"y = {f'{self.activation}({product})' if self.activation else product}{residual}"


@cache
def emit(kernel: Linear, origin: str = "") -> str:
    """A Python file with the kernel, and `run`, which launches it.

    Args:
        origin: where in a model it comes from, by names of fuser's own; a comment.
    """
    if kernel.gated and kernel.activation is None:
        raise ValueError("a gate has an activation")
    source = Source()
    source.docstring(
        f"{kernel}",
        f"x [M, K], weight [{'2 N' if kernel.gated else 'N'}, K], y [M, N]; M at most {ROWS}.",
        f"Grid: N / BLOCK_N programs. One computes BLOCK_N columns of y for all rows, and streams its rows of the weight once, "
        f"BLOCK_K elements at a time. Sums are in float32; {_rows_as()}",
        f"From {origin}." if origin else "",
    )
    source("", "import torch", "import triton", "import triton.language as tl", "", "")
    _kernel(source, kernel, vector=True)
    source("", "")
    _kernel(source, kernel, vector=False)
    source("", "")
    _run(source, kernel)
    return source.text


def _rows_as() -> str:
    return "one row is multiplied elementwise and summed up at the end, several go through the tensor cores."


def _parameters(kernel: Linear) -> list[str]:
    names = ["x_ptr", "weight_ptr"]
    names += ["gain_ptr"] if kernel.norm else []
    names += ["bias_ptr"] if kernel.bias else []
    names += ["residual_ptr"] if kernel.residual else []
    return [*names, "y_ptr"]


def _kernel(source: Source, kernel: Linear, *, vector: bool) -> None:
    """The kernel for one row (`vector`), or for several."""
    sizes = ["N: tl.constexpr", "K: tl.constexpr", "eps"] if kernel.norm else ["N: tl.constexpr", "K: tl.constexpr"]
    blocks = ["BLOCK_N: tl.constexpr", "BLOCK_K: tl.constexpr"]
    rows = [] if vector else ["M"]
    blocks = blocks if vector else ["BLOCK_M: tl.constexpr", *blocks]
    source("@triton.jit")
    name = "one_row" if vector else "several_rows"
    parts = ("gate", "up") if kernel.gated else ("y",)
    source(f"def {name}(")
    with source:
        source(f"{', '.join([*_parameters(kernel), *rows])},", f"{', '.join([*sizes, *blocks])},")
    with source.block("):"):
        source("columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)", "in_n = columns < N")
        if vector:
            source(*(f"{part}_sum = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)" for part in parts))
            if kernel.norm:
                source("squares = tl.zeros((BLOCK_K,), tl.float32)")
        else:
            source("rows = tl.arange(0, BLOCK_M)", "in_m = rows < M")
            source(*(f"{part}_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)" for part in parts))
            if kernel.norm:
                source("squares = tl.zeros((BLOCK_M,), tl.float32)")
        with source.block("for start in range(0, K, BLOCK_K):"):
            source("ks = start + tl.arange(0, BLOCK_K)", "in_k = ks < K")
            _loads(source, kernel, parts, vector=vector)
        _finish(source, kernel, parts, vector=vector)


def _loads(source: Source, kernel: Linear, parts: tuple[str, ...], *, vector: bool) -> None:
    """One step along K."""
    if vector:
        source("x = tl.load(x_ptr + ks, mask=in_k, other=0.0).to(tl.float32)")
    else:
        source("x = tl.load(x_ptr + rows[:, None] * K + ks[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)")
    if kernel.norm:
        wide = "x" if vector else "x.to(tl.float32)"
        source("gain = tl.load(gain_ptr + ks, mask=in_k, other=0.0).to(tl.float32)")
        if vector:
            source("squares += x * x", "x = x * gain")
        else:
            source(f"wide = {wide}", "squares += tl.sum(wide * wide, 1)", "x = (wide * gain[None, :]).to(x.dtype)")
    for index, part in enumerate(parts):
        row = "columns" if index == 0 else "(columns + N)"
        mask = "mask=in_n[:, None] & in_k[None, :], other=0.0"
        source(f"{part}_weight = tl.load(weight_ptr + {row}[:, None] * K + ks[None, :], {mask})")
        if vector:
            source(f"{part}_sum += {part}_weight.to(tl.float32) * x[None, :]")
        else:
            source(f'{part}_sum = tl.dot(x, tl.trans({part}_weight), {part}_sum, input_precision="ieee")')


def _finish(source: Source, kernel: Linear, parts: tuple[str, ...], *, vector: bool) -> None:
    """The epilogue on the sums, in float32."""
    if kernel.norm:
        total = "tl.sum(squares, 0)" if vector else "squares"
        source(f"rstd = tl.rsqrt({total} / K + eps)")
    for index, part in enumerate(parts):
        value = f"tl.sum({part}_sum, 1)" if vector else f"{part}_sum"
        if kernel.norm:
            value += " * rstd" if vector else " * rstd[:, None]"
        source(f"{part} = {value}")
        if kernel.bias:
            offset = "columns" if index == 0 else "columns + N"
            bias = f"tl.load(bias_ptr + {offset}, mask=in_n, other=0.0).to(tl.float32)"
            source(f"{part} += {bias}" if vector else f"{part} += {bias}[None, :]")
    if kernel.gated:
        assert kernel.activation is not None
        source(f"y = ({ACTIVATIONS[kernel.activation].format('gate')}) * up")
    elif kernel.activation:
        source(f"y = {ACTIVATIONS[kernel.activation].format('y')}")
    if vector:
        place, mask = "columns", "in_n"
    else:
        source("places = rows[:, None] * N + columns[None, :]", "inside = in_m[:, None] & in_n[None, :]")
        place, mask = "places", "inside"
    if kernel.residual:
        source(f"y += tl.load(residual_ptr + {place}, mask={mask}, other=0.0).to(tl.float32)")
    source(f"tl.store(y_ptr + {place}, y.to(y_ptr.dtype.element_ty), mask={mask})")


def _run(source: Source, kernel: Linear) -> None:
    keywords = ["gain"] if kernel.norm else []
    keywords += ["bias"] if kernel.bias else []
    keywords += ["residual"] if kernel.residual else []
    keywords += ["eps"] if kernel.norm else []
    given = ["x", "weight", *([*["*"], *keywords] if keywords else [])]
    rest = ["out=None", "block_n=None", "block_k=None", "num_warps=None", "num_stages=None"]
    if not keywords:
        rest = ["*", *rest]
    tensors = [name for name in ("gain", "bias", "residual") if name in keywords]
    with source.block(f"def run({', '.join([*given, *rest])}):"):
        source.docstring("One launch, into `out` where it is given; all tensors are contiguous and of one type.")
        source("M, K = x.shape", f"N = weight.shape[0]{' // 2' if kernel.gated else ''}")
        source("y = torch.empty((M, N), dtype=x.dtype, device=x.device) if out is None else out")
        arguments = ["x", "weight", *tensors, "y"]
        eps = ["eps"] if kernel.norm else []
        with source.block("if M == 1:"):
            source(
                "BLOCK_N, BLOCK_K, warps = block_n or 1, block_k or 2048, num_warps or 8",
                "BLOCK_K = min(BLOCK_K, triton.next_power_of_2(K))",
            )
            _launch(source, "one_row", [*arguments], ["N", "K", *eps, "BLOCK_N", "BLOCK_K"], stages=2)
        with source.block("else:"):
            source(
                "BLOCK_M = max(16, triton.next_power_of_2(M))",
                f"BLOCK_N, BLOCK_K, warps = block_n or {64 if kernel.norm else 32}, block_k or 128, num_warps or 4",
                "BLOCK_K = max(16, min(BLOCK_K, triton.next_power_of_2(K)))",
            )
            _launch(
                source, "several_rows", [*arguments, "M"], ["N", "K", *eps, "BLOCK_M", "BLOCK_N", "BLOCK_K"], stages=4
            )
        source("return y")


def _launch(source: Source, name: str, arguments: list[str], sizes: list[str], *, stages: int) -> None:
    source(f"{name}[(triton.cdiv(N, BLOCK_N),)](")
    with source:
        source(
            f"{', '.join(arguments)},", f"{', '.join(sizes)},", f"num_warps=warps, num_stages=num_stages or {stages},"
        )
    source(")")
