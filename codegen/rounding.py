"""Rows rounded to eight bits, each by a scale of its own: inputs of products. A norm before is part of it."""

from dataclasses import dataclass
from typing import Literal

from fuser.codegen.kernel import LONGEST_ROW, Emitter, Kernel, element, power_of_two
from fuser.errors import UsageError
from fuser.formats import FP8_MOST

TYPES = {"int8": "i8", "fp8": "fp8e4nv"}  # Triton's names


@dataclass(frozen=True)
class Rounding:
    """What a rounding kernel computes: y = x / scale rounded to `kind`, scale = max|x| / 127 (E4M3: 448) over a row of D.

    x is of `dtype`; with `norm` its RMSNorm or LayerNorm, rounded to `dtype`, with a `weight` and a `bias` where they are.
    A row of zeros has scale 1; one that holds a number that is not finite has scale NaN.
    """

    D: int
    kind: str
    dtype: str = "bf16"
    norm: Literal["rms", "layer"] | None = None
    norm_eps: float = 0.0
    weight: bool = False
    bias: bool = False

    @property
    def tensors(self) -> list[str]:
        """The kernel's tensors, in the order of `launch`."""
        return ["x", *["weight"] * self.weight, *["bias"] * self.bias, "y", "scales"]


def rounding(what: Rounding, *, num_warps: int | None = None) -> Kernel:
    """The kernel of `what`: launch(*what.tensors): x rows of any stride; y [rows, D] of `kind`; scales [rows] float32.

    Raises:
        UsageError: a row too long, another type.
    """
    if what.D > LONGEST_ROW or what.kind not in TYPES:
        raise UsageError(f"codegen: rows of at most {LONGEST_ROW} are rounded to {', '.join(TYPES)}, not {what}")
    BLOCK = power_of_two(what.D)
    before = f"{what.norm}_norm(x)" if what.norm else "x"
    e = Emitter(
        "rounding",
        f"Rows of {what.D}: {before} in {what.kind}, each by a scale of its own.",
        ("Grid: (rows,). One program rounds one row, in float32.",),
        {"num_warps": num_warps or min(max(BLOCK // 512, 1), 16), "num_stages": 1},
    )
    for name in what.tensors[:-2]:
        e.pointer(name, element(what.dtype))
    e.pointer("y", TYPES[what.kind])
    e.pointer("scales", "fp32")
    e.integer("x_stride")
    e.constant(D=what.D, BLOCK=BLOCK)
    masked = what.D != BLOCK
    mask, other = (", mask=columns < D", ", other=0.0") if masked else ("", "")
    e.begin(waits=True)
    e.add("row = tl.program_id(0).to(tl.int64)", "columns = tl.arange(0, BLOCK)")
    e.add(f"a = tl.load(x + row * x_stride + columns{mask}{other}).to(tl.float32)")
    if what.norm == "layer":
        e.add("a -= tl.sum(a, 0) / D")
        if masked:
            e.add("a = tl.where(columns < D, a, 0.0)")
    if what.norm:
        e.add(f"a *= tl.rsqrt(tl.sum(a * a, 0) / D + {what.norm_eps!r})")
    for name, sign in (("weight", "*"), ("bias", "+")):
        if name in what.tensors:
            e.add(f"a {sign}= tl.load({name} + columns{mask}{other}).to(tl.float32)")
    if what.norm:
        e.add("a = a.to(x.dtype.element_ty).to(tl.float32)")
    most = 127.0 if what.kind == "int8" else FP8_MOST
    e.add(
        "highest = tl.max(tl.abs(a), 0)",
        "not_finite = tl.sum(a * 0.0, 0)  # 0, or NaN",
        f"scale = tl.where(highest > 0.0, highest / {most!r}, 1.0) + not_finite",
        f"rounded = tl.minimum(tl.maximum(a / scale, {-most!r}), {most!r})",
    )
    if what.kind == "int8":
        e.add("rounded = rounded + 12582912.0 - 12582912.0  # to the nearest integer, ties to even")
    e.add(f"tl.store(y + row * D + columns, rounded.to(y.dtype.element_ty){mask})", "tl.store(scales + row, scale)")
    e.host += [
        f"def launch({', '.join(what.tensors)}, pdl=False):",
        '    """Fills y and scales; rows of x may be strided."""',
        "    rows = y.shape[0]",
        "    if rows:",
        f"        {e.launched('(rows,)', *what.tensors, 'x.stride(0)')}",
    ]
    return e.kernel()
