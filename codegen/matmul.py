"""Linear kernels of many tokens: y = x W^T by tensor cores, with bias, activation, gate and residual in the same launch."""

from dataclasses import dataclass

from fuser.codegen.kernel import Emitter, Kernel, activated, element
from fuser.codegen.rounding import TYPES
from fuser.errors import UsageError

SMALL = 132  # tiles of 128 x 128, below which they are made smaller


@dataclass(frozen=True)
class Tiles:
    """A configuration: rows of x and of W a program, columns a step, tiles that share columns of W, warps, stages."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    GROUP: int = 8
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True)
class Matmul:
    """What a large linear kernel computes, for any number of tokens M.

    y = x W^T + bias [M, N], W [N, K], or [K, N] if `by_input`; with `activation` y = activation(y), or, if `gated`, W holds
    gate and up side by side and y = activation(gate) * up, [M, N / 2]. With `residual`, y += residual.

    With a `kind`, int8 or fp8, x and W [N, K] are of it, with `x_scales` [M] and `scales` [N], float32.
    """

    N: int
    K: int
    dtype: str = "bf16"
    by_input: bool = False
    bias: bool = False
    activation: str | None = None
    gated: bool = False
    residual: bool = False
    kind: str | None = None

    @property
    def width(self) -> int:
        """The width of y."""
        return self.N // 2 if self.gated else self.N

    @property
    def tensors(self) -> list[str]:
        """The kernel's tensors, in the order of `launch`."""
        scaled = self.kind is not None
        return [
            "x",
            *["x_scales"] * scaled,
            "weight",
            *["scales"] * scaled,
            *["bias"] * self.bias,
            *["residual"] * self.residual,
            "y",
        ]


def matmul(what: Matmul, tiles: Tiles | None = None) -> Kernel:
    """The kernel of `what`: launch(*what.tensors, pdl=False), of `dtype`; rows of x may be strided, the others are contiguous.

    Raises:
        UsageError: an activation or a dtype that the family does not have; a gate of odd width, or without an activation.
    """
    if what.gated and (what.N % 2 or not what.activation):
        raise UsageError("codegen: gate and up side by side have an even width and an activation")
    tiles = tiles or default_tiles(what)
    sides = ("gate", "up") if what.gated else ("out",)
    value = f"{what.activation}(gate) * up" if what.gated else f"{what.activation or ''}(x W^T)"
    shape = f"[{what.K}, {what.N}]" if what.by_input else f"[{what.N}, {what.K}]"
    e = Emitter(
        "matmul",
        f"y = {value}{' + bias' if what.bias else ''}{' + residual' if what.residual else ''}, W {shape}.",
        (
            "Grid: (tiles of y,), in groups of rows of tiles, whose parts of W and x stay in the cache.",
            f"One program computes {tiles.BLOCK_M} rows and {tiles.BLOCK_N} columns of y, {tiles.BLOCK_K} of K a step.",
            "Products by tensor cores, sums in float32, rounded once.",
        ),
        {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )
    if what.kind is not None and (what.kind not in TYPES or what.by_input):
        raise UsageError(f"codegen: a product of eight bits is of {', '.join(TYPES)}, with W [N, K]")
    for tensor in what.tensors:
        if tensor in ("x_scales", "scales"):
            e.pointer(tensor, "fp32")
        else:
            eight = what.kind is not None and tensor in ("x", "weight")
            e.pointer(tensor, TYPES[str(what.kind)] if eight else element(what.dtype))
    e.integer("M")
    e.integer("x_stride")
    e.constant(N=what.width, K=what.K, BLOCK_M=tiles.BLOCK_M, BLOCK_N=tiles.BLOCK_N, BLOCK_K=tiles.BLOCK_K)
    e.constant(GROUP=tiles.GROUP)
    if what.activation:
        activated(e, what.activation)
    e.begin(waits=True)
    _places(e, what, sides)
    _main_loop(e, what, tiles, sides)
    _epilogue(e, what, sides)
    blocks = f"triton.cdiv(M, {tiles.BLOCK_M!r}) * {-(-what.width // tiles.BLOCK_N)!r}"
    e.host += [
        f"def launch({', '.join(what.tensors)}, pdl=False):",
        '    """Fills y; rows of x may be strided."""',
        "    M = x.shape[0]",
        "    if M:",
        f"        {e.launched(f'({blocks},)', *what.tensors, 'M', 'x.stride(0)')}",
    ]
    return e.kernel()


def default_tiles(what: Matmul, tokens: int = 4096) -> Tiles:
    """Tiles that are good without a search, for about so many tokens."""
    if what.dtype == "fp32":  # without tensor cores, whose precision is less
        return Tiles(32, 32, 32, num_warps=4, num_stages=2)
    if what.kind is not None:
        if what.gated:
            return Tiles(BLOCK_N=64, BLOCK_K=128) if tokens <= 512 else Tiles(BLOCK_K=128)
        if -(-tokens // 128) * -(-what.N // 128) < SMALL:
            return Tiles(64, 64, 128, num_warps=4, num_stages=5)
        return Tiles(BLOCK_K=128)
    return Tiles(BLOCK_N=64) if what.gated else Tiles(num_stages=4)


def _places(e: Emitter, what: Matmul, sides: tuple[str, ...]) -> None:
    e.add(
        "# Tiles of a group of rows one after another, column by column.",
        "columns = tl.cdiv(N, BLOCK_N)",
        "first = tl.program_id(0) // (GROUP * columns) * GROUP",
        "high = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)",
        "within = tl.program_id(0) % (GROUP * columns)",
        "m = (first + within % high) * BLOCK_M + tl.arange(0, BLOCK_M)",
        "n = within // high * BLOCK_N + tl.arange(0, BLOCK_N)",
        "# What is past the end wraps around, and is not stored.",
        "rows = x + (m % M).to(tl.int64)[:, None] * x_stride",
        "inside = n % N",
    )
    for side in sides:
        row = "(N + inside)" if side == "up" else "inside"
        place = f"{row}[None, :]" if what.by_input else f"{row}.to(tl.int64)[None, :] * K"
        e.add(f"{side}_columns = weight + {place}")
    for side in sides:
        e.add(f"{side} = tl.zeros([BLOCK_M, BLOCK_N], {'tl.int32' if what.kind == 'int8' else 'tl.float32'})")


def _main_loop(e: Emitter, what: Matmul, tiles: Tiles, sides: tuple[str, ...]) -> None:
    exact = ', input_precision="ieee"' if what.dtype == "fp32" else ""
    if what.kind is not None:
        exact = ", out_dtype=tl.int32" if what.kind == "int8" else ""
    ragged = what.K % tiles.BLOCK_K != 0
    with e.block("for step in range(0, K, BLOCK_K):"):
        e.add("k = step + tl.arange(0, BLOCK_K)")
        by_row, by_column = (
            (f", mask=(k < K){spread}, other=0.0" if ragged else "") for spread in ("[None, :]", "[:, None]")
        )
        e.add(f"a = tl.load(rows + k[None, :]{by_row})")
        for side in sides:
            place = f"k[:, None].to(tl.int64) * {what.N!r}" if what.by_input else "k[:, None]"
            e.add(f"b = tl.load({side}_columns + {place}{by_column})", f"{side} = tl.dot(a, b, {side}{exact})")


def _epilogue(e: Emitter, what: Matmul, sides: tuple[str, ...]) -> None:
    if what.kind is not None:
        e.add("x_scale = tl.load(x_scales + m % M)[:, None]")
        for side in sides:
            row = "N + inside" if side == "up" else "inside"
            e.add(f"{side} = {side}.to(tl.float32) * x_scale * tl.load(scales + {row})[None, :]")
    if what.bias:
        for side in sides:
            e.add(f"{side} += tl.load(bias + {'N + inside' if side == 'up' else 'inside'}).to(tl.float32)[None, :]")
    if what.activation:
        e.add("out = activation(gate) * up" if what.gated else "out = activation(out)")
    e.add(
        "place = m.to(tl.int64)[:, None] * N + n[None, :]",
        "stored = (m < M)[:, None] & (n < N)[None, :]",
    )
    if what.residual:
        e.add("out += tl.load(residual + place, mask=stored).to(tl.float32)")
    e.add("tl.store(y + place, out, mask=stored)")
