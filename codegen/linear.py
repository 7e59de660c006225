"""Linear kernels of few tokens: y = x W^T, a norm before, bias, gate, residual or rotary embedding after, in one launch.

The weight is read once, as a stream; what the kernel does besides must hide behind that. A prologue (the norm of x), a main
loop (products of one token by multiply-add, of more by tensor cores with the weight as the left operand) and an epilogue
compose. What depends on the weight alone is done to the weight, once, when it is loaded: a norm's scale is multiplied into W.
"""

from dataclasses import dataclass
from typing import Literal

from fuser.codegen.kernel import Emitter, Kernel, activated, element, power_of_two
from fuser.codegen.rotary import Rotary, rotary_epilogue
from fuser.codegen.rounding import TYPES
from fuser.errors import UsageError
from fuser.formats import KNOWN, Format

MOST_TOKENS = 64
TOGETHER = 8  # parts of K whose sums are loaded at a time


@dataclass(frozen=True)
class Tiling:
    """A configuration of a linear kernel: rows of W a program, columns a step, parts of K, warps, pipeline stages."""

    BLOCK_N: int
    BLOCK_K: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Linear:
    """What a linear kernel computes, for x [M, K], M <= tokens.

    y = norm(x) W^T + bias, W [N, K], or [K, N] if `by_input`. `norm` is without its own scale and shift, which belong in W
    and bias: norm(x) * scale + shift before W is norm(x) before W * scale, with W shift added to the bias. Of a
    layer norm the kernel takes `column_sums` [N] float32, the sums of W over K.

    With `activation` y = activation(y), or, if `gated`, W holds gate and up side by side and y = activation(gate) * up,
    [M, N / 2]. With `residual`, y += residual, [M, width of y]. With `rotary`, rows of W are those of the heads of q, k and
    v, in this order: y [M, H Dh] holds the queries, turned, and keys and values go to their slots of the cache; before
    they turn, each head of q and k has its RMSNorm if `head_norm_eps` is given, with a weight [Dh] each.

    With `format`, W is codes in the order of codegen/quantized.py, int32, with `scales` [groups, N] of `scale_dtype` and,
    unless it is symmetric, `zeros` of `dtype`, -zero as the kernel adds it: rows of W in the order of the kernel's columns,
    those of gate (of the first of each pair that turns) before those of up (the second). A norm is not part of it: its
    scale cannot be in codes, and multiplied into x by every program it costs more than a launch of its own.

    With a format of quantized inputs W [N, K] and x are int8 or E4M3 numbers, with `scales` [N] and `x_scales` [tokens],
    float32, which the epilogue applies.
    """

    N: int
    K: int
    tokens: int = 1
    dtype: str = "bf16"
    by_input: bool = False
    norm: Literal["rms", "layer"] | None = None
    norm_eps: float = 0.0
    bias: bool = False
    activation: str | None = None
    gated: bool = True
    residual: bool = False
    rotary: Rotary | None = None
    head_norm_eps: float | None = None
    format: Format | None = None
    scale_dtype: str = "fp16"

    @property
    def width(self) -> int:
        """The width of y."""
        if self.rotary is not None:
            return self.rotary.heads * self.rotary.head_dim
        return self.N // 2 if self.pairs else self.N

    @property
    def pairs(self) -> bool:
        """Whether W holds gate and up."""
        return self.activation is not None and self.gated

    @property
    def rounds(self) -> bool:
        """Whether x and W are of eight bits."""
        return self.format is not None and self.format.activations is not None

    @property
    def tensors(self) -> list[str]:
        """The kernel's tensors, in the order of `launch`."""
        names = ["x", *["x_scales"] * self.rounds, "weight"]
        if self.format is not None:
            names += ["scales"] + ["zeros"] * (not self.format.symmetric)
        names += ["column_sums"] * (self.norm == "layer")
        names += ["bias"] * self.bias + ["residual"] * self.residual
        if self.rotary is not None:
            names += ["q_norm_weight", "k_norm_weight"] * (self.head_norm_eps is not None)
            names += ["cos", "sin", "positions"] * (self.rotary.rotary_dim > 0)
            names += ["slot_mapping", *self.rotary.caches]
        return [*names, "y"]


def linear(what: Linear, tiling: Tiling | None = None) -> Kernel:
    """The kernel of `what`: launch(*what.tensors[, partial, arrived], pdl=False), all contiguous.

    Tensors are of `what.dtype`, those of rotary embedding as `Rotary` says, in a workspace where K is taken in parts.

    Raises:
        UsageError: sizes, a dtype, an activation or a tiling that the family does not have.
    """
    if what.format is not None and not what.rounds:
        raise UsageError("codegen: a product with codes is no plain linear")
    if what.rounds and (what.by_input or what.format not in (KNOWN["w8a8"], KNOWN["fp8"])):
        raise UsageError("codegen: a product of eight bits has W [N, K], with a scale for each row")
    tiling = tiling or default_tiling(what)
    checked(what, tiling)
    return Composition(what, tiling).kernel()


def checked(what: Linear, tiling: Tiling) -> None:
    """Raises UsageError for what the family does not have."""
    if not 1 <= what.tokens <= MOST_TOKENS:
        raise UsageError(f"codegen: a linear of few tokens takes 1 to {MOST_TOKENS}, not {what.tokens}")
    if what.norm not in (None, "rms", "layer"):
        raise UsageError(f"codegen: a norm is rms or layer, not {what.norm}")
    if what.pairs and what.N % 2:
        raise UsageError(f"codegen: gate and up side by side have an even width, not {what.N}")
    if what.rotary is not None:
        _check_rotary(what, what.rotary, tiling)
    if what.norm is not None and what.format is not None:
        raise UsageError("codegen: a norm before a product with codes is a launch of its own")
    if tiling.splits < 1 or (tiling.splits - 1) * tiling.BLOCK_K * _steps(what, tiling) >= what.K:
        raise UsageError(f"codegen: K = {what.K} has no {tiling.splits} parts of whole steps of {tiling.BLOCK_K}")


def _check_rotary(what: Linear, rotary: Rotary, tiling: Tiling) -> None:
    wanted = (rotary.heads + 2 * rotary.kv_heads) * rotary.head_dim
    if wanted != what.N:
        raise UsageError(f"codegen: q, k and v of {rotary} have {wanted} rows of W, not {what.N}")
    if rotary.by_block_table or what.activation or what.residual or rotary.dtype != what.dtype:
        raise UsageError("codegen: a projection with rotary embedding has slots, one dtype, no gate and no residual")
    if rotary.head_dim % 2:
        raise UsageError(
            f"codegen: heads of a projection with rotary embedding are of even width, not {rotary.head_dim}"
        )
    if what.head_norm_eps is not None and power_of_two(rotary.head_dim) != rotary.head_dim:
        raise UsageError(f"codegen: a projection norms heads whose width is a power of two, not {rotary.head_dim}")
    if what.head_norm_eps is not None and rotary.head_dim != 2 * tiling.BLOCK_N:
        raise UsageError(
            f"codegen: a norm of heads takes a head of {rotary.head_dim} a program, not {2 * tiling.BLOCK_N}"
        )
    if rotary.kv_group:
        raise UsageError("codegen: int8 keys and values are written by a kernel of their own, not by a projection")


def default_tiling(what: Linear) -> Tiling:
    """A tiling that is good without a search: whole rows of W by wide loads, K in parts where there are few rows."""
    pairs = what.pairs or what.rotary is not None  # two rows of W for each of a program's columns
    whole_head = what.rotary.head_dim // 2 if what.rotary is not None and what.head_norm_eps is not None else 0
    if what.tokens == 1 and (what.by_input or whole_head) and not what.rounds:
        BLOCK_N, BLOCK_K = whole_head or 64, min(power_of_two(what.K), 64)
        return Tiling(BLOCK_N, BLOCK_K, _splits(what, BLOCK_N, BLOCK_K, 400), num_warps=4, num_stages=1)
    if what.tokens == 1 and not what.rounds:
        BLOCK_K = min(power_of_two(what.K), 2048 if pairs else 4096)
        return Tiling(1, BLOCK_K, num_warps=max(BLOCK_K // 512, 1), num_stages=1)
    if what.rounds:
        BLOCK_N, BLOCK_K, stages = whole_head or 64, 256 if what.tokens <= 32 else 128, 4
    elif what.dtype == "fp32":  # without tensor cores, whose precision is less, operands are held in registers
        BLOCK_N, BLOCK_K, stages = whole_head or 16, 32, 4
    else:
        BLOCK_N, BLOCK_K, stages = whole_head or 64, *((128, 4) if what.tokens <= 32 else (64, 6))
    BLOCK_K = max(min(power_of_two(what.K), BLOCK_K), 16)
    warps = 8 if whole_head and what.tokens > 32 else 4
    return Tiling(BLOCK_N, BLOCK_K, _splits(what, BLOCK_N, BLOCK_K, 132), num_warps=warps, num_stages=stages)


def _columns(what: Linear) -> int:
    """What programs share out: columns of y, or pairs of rows of W that turn together."""
    return what.N // 2 if what.rotary is not None else what.width


def _splits(what: Linear, BLOCK_N: int, BLOCK_K: int, most: int) -> int:
    """Parts of K so that at most so many programs run, where they are few, each of at least four steps."""
    programs = -(-_columns(what) // BLOCK_N)
    steps = -(-what.K // BLOCK_K)
    wanted = max(min(most // programs, steps // 4), 1)
    return -(-steps // -(-steps // wanted))


def _steps(what: Linear, tiling: Tiling) -> int:
    """Steps of one part of K."""
    steps = -(-what.K // tiling.BLOCK_K)
    return -(-steps // tiling.splits)


def rows_of(e: Emitter, what: Linear) -> list[str]:
    """The row of W of each side, by the column n of a program."""
    if what.pairs:
        return ["n", "(N + n)"]
    if what.rotary is None:
        return ["n"]
    e.add("# Rows of W by pairs that turn together, within one head; what does not turn is in pairs as well.")
    e.add("head = n // (D // 2)", "pair = n % (D // 2)")
    if what.rotary.interleaved:
        first, second = "2 * pair", "2 * pair + 1"
    elif what.rotary.rotary_dim == what.rotary.head_dim:
        first, second = "pair", "R + pair"
    else:
        first, second = "tl.where(pair < R, pair, R + pair)", "tl.where(pair < R, R, D // 2) + pair"
    e.add(f"a_row = head * D + {first}", f"b_row = head * D + {second}")
    return ["a_row", "b_row"]


class Composition:
    """One kernel being composed; each method adds one part of its body."""

    def __init__(self, what: Linear, tiling: Tiling) -> None:
        self.what, self.tiling = what, tiling
        self.dot = what.tokens > 1 or what.format is not None
        self.rows = max(power_of_two(what.tokens), 16) if self.dot else 1
        self.sides = ("gate", "up") if what.pairs else ("a", "b") if what.rotary else ("out",)
        self.columns = _columns(what)
        self.ragged_n = self.columns % tiling.BLOCK_N != 0
        self.ragged_k = what.K % tiling.BLOCK_K != 0 or (what.K // tiling.BLOCK_K) % tiling.splits != 0
        # Statistics are taken beside the product and applied to it afterwards, which hides their cost.
        self.statistics = {"rms": ["squares"], "layer": ["squares", "sums"]}[what.norm] if what.norm else []
        # Unrolled, all loads of a row are in flight at once.
        self.unrolled = tiling.splits == 1 and not self.dot and -(-what.K // tiling.BLOCK_K) <= 4
        self.emitter = self._emitter()

    def _emitter(self) -> Emitter:
        what, tiling = self.what, self.tiling
        product = f"{f'{what.norm}_norm(x)' if what.norm else 'x'} W^T{' + bias' if what.bias else ''}"
        value = f"{what.activation}({product})" if what.activation else product
        if what.pairs:
            value = f"{what.activation}(gate) * up, (gate, up) = {product}"
        shape = f"[{what.K}, {what.N}]" if what.by_input else f"[{what.N}, {what.K}]"
        shape += f" as {what.format}" if what.format is not None else ""
        result = "q, k, v" if what.rotary else "y"
        summary = (
            f"{result} = {value}{' + residual' if what.residual else ''} for at most {what.tokens} tokens, W {shape}."
        )
        share = "pairs of rows of W" if what.rotary else "columns of y"
        grid = f"Grid: (blocks of {share},)."
        work = f"One program computes {tiling.BLOCK_N} {share} for every token, {tiling.BLOCK_K} columns of x a step."
        if tiling.splits > 1:
            grid = f"Grid: (blocks of {share}, {tiling.splits} parts of K)."
            work += (
                "\nThe last of a block's parts to arrive adds them all, in their order, so results repeat bit by bit."
            )
        if what.rotary:
            work += f"\nThen {what.rotary.heads} heads of q and {what.rotary.kv_heads} of k turn; k and v go to their slots."
        how = "by tensor cores" if self.dot else "by multiply-add"
        details = (grid, *work.splitlines(), f"Products {how}, sums in float32, rounded once.")
        e = Emitter("linear", summary, details, {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages})
        for tensor in what.tensors:
            if what.rotary and tensor in ("cos", "sin", "positions", "slot_mapping", *what.rotary.caches):
                e.pointer(tensor, what.rotary.kind(tensor))
            elif tensor in ("column_sums", "x_scales") or (tensor == "scales" and what.rounds):
                e.pointer(tensor, "fp32")
            elif what.rounds and tensor in ("x", "weight"):
                assert what.format is not None
                e.pointer(tensor, TYPES[what.format.kind])
            elif tensor == "scales":
                e.pointer(tensor, element(what.scale_dtype))
            elif tensor == "weight" and what.format is not None:
                e.pointer(tensor, "i32")
            else:
                e.pointer(tensor, element(what.dtype))
        if tiling.splits > 1:
            e.pointer("partial", "fp32")
            e.pointer("arrived", "i32")
        if self.dot:
            e.integer("tokens")
        e.constant(N=self.columns, K=what.K, BLOCK_N=tiling.BLOCK_N, BLOCK_K=tiling.BLOCK_K)
        if self.dot:
            e.constant(BLOCK_M=self.rows)
        if what.rotary:
            r = what.rotary
            e.constant(H=r.heads, G=r.kv_heads, D=r.head_dim, R=r.rotary_dim // 2)
        if what.norm:
            e.constant(EPS=what.norm_eps)
        if tiling.splits > 1:
            e.constant(SPLITS=tiling.splits, PART=_steps(what, tiling) * tiling.BLOCK_K)
        if what.activation:
            activated(e, what.activation)
        return e

    def kernel(self) -> Kernel:
        """The whole of it."""
        self.emitter.begin()
        self._places()
        self._main_loop()
        if self.tiling.splits > 1:
            self._combine()
        self._norm()
        self._epilogue()
        self._host()
        return self.emitter.kernel()

    def _places(self) -> None:
        e = self.emitter
        e.add("n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)")
        if self.ragged_n:
            e.add("n_inside = n < N")
        if self.dot:
            e.add("m = tl.arange(0, BLOCK_M)", "m_inside = m < tokens")
        self._row_names = rows_of(e, self.what)
        self._row_pointers()

    def _row_pointers(self) -> None:
        """Where the rows of W begin."""
        e = self.emitter
        for side, row in zip(self.sides, self._row_names, strict=True):
            e.add(f"{side}_rows = weight + {row if self.what.by_input else f'{row}.to(tl.int64) * K'}")

    def _load_x(self) -> None:
        """x as [BLOCK_K, BLOCK_M], or [1, BLOCK_K]: the right operand."""
        if self.dot:
            mask = "m_inside[None, :]" + (" & k_inside[:, None]" if self.ragged_k else "")
            place = "x + m[None, :] * K + k[:, None]"
        else:
            mask = "k_inside[None, :]" if self.ragged_k else ""
            place = "x + k[None, :]"
        masked = f", mask={mask}, other=0.0" if mask else ""
        self.emitter.add(f'tokens_tile = tl.load({place}{masked}, eviction_policy="evict_last")')

    def _k(self, step: str, bound: str) -> None:
        self.emitter.add(f"k = {step} + tl.arange(0, BLOCK_K)")
        if self.ragged_k:
            self.emitter.add(f"k_inside = k < {bound}")

    def _main_loop(self) -> None:
        e, what = self.emitter, self.what
        shape = "[BLOCK_N, BLOCK_M]" if self.dot else "[BLOCK_N, BLOCK_K]"
        statistics = "[BLOCK_K, BLOCK_M]" if self.dot else "[1, BLOCK_K]"
        e.add("# Main loop: W streams by, x stays in the cache.")
        kind = "tl.int32" if what.rounds and what.format is not None and what.format.kind == "int8" else "tl.float32"
        for side in self.sides:
            e.add(f"{side} = tl.zeros({shape}, {kind})")
        for name in self.statistics:
            e.add(f"{name} = tl.zeros({statistics}, tl.float32)")
        if self.unrolled:
            self._unrolled_steps()
        else:
            first, last = "0", "K"
            if self.tiling.splits > 1:
                e.add("begin = tl.program_id(1) * PART", "end = tl.minimum(begin + PART, K)")
                first, last = "begin", "end"
            e.wait()
            with e.block(f"for step in range({first}, {last}, BLOCK_K):"):
                self._k("step", last)
                for side in self.sides:
                    self._load_weight(side, f"{side}_tile")
                self._load_x()
                self._multiply()
        if not self.dot:
            for side in self.sides:
                e.add(f"{side} = tl.sum({side}, 1)")
        if kind == "tl.int32":
            for side in self.sides:
                e.add(f"{side} = {side}.to(tl.float32)")
        for name in self.statistics:
            e.add(f"{name} = tl.sum({name}, {0 if self.dot else 1})")

    def _unrolled_steps(self) -> None:
        """Every step of K written out: all of the weight is on its way before anything is waited for."""
        e = self.emitter
        starts = range(0, self.what.K, self.tiling.BLOCK_K)
        for i, start in enumerate(starts):
            self._k(repr(start), "K")
            for side in self.sides:
                self._load_weight(side, f"{side}_tile_{i}")
        e.wait()
        for i, start in enumerate(starts):
            if len(starts) > 1:
                self._k(repr(start), "K")
            self._load_x()
            self._multiply(f"_{i}")

    def _load_weight(self, side: str, target: str) -> None:
        columns = f"k[None, :].to(tl.int64) * {self.what.N!r}" if self.what.by_input else "k[None, :]"
        masks = ["n_inside[:, None]"] * self.ragged_n + ["k_inside[None, :]"] * self.ragged_k
        masked = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        self.emitter.add(f'{target} = tl.load({side}_rows[:, None] + {columns}{masked}, eviction_policy="evict_first")')

    def _multiply(self, step: str = "") -> None:
        e = self.emitter
        if self.statistics or not self.dot:
            e.add("wide = tokens_tile.to(tl.float32)")
        for name in self.statistics:
            e.add(f"{name} += {'wide * wide' if name == 'squares' else 'wide'}")
        for side in self.sides:
            if self.dot:
                exact = ', input_precision="ieee"' if self.what.dtype == "fp32" else ""
                if self.what.rounds and self.what.format is not None and self.what.format.kind == "int8":
                    exact = ", out_dtype=tl.int32"
                e.add(f"{side} = tl.dot({side}_tile, tokens_tile, {side}{exact})")
            else:
                e.add(f"{side} += {side}_tile{step}.to(tl.float32) * wide")

    def _combine(self) -> None:
        """Each block leaves, for each part, its sides' sums and then its statistics."""
        e = self.emitter
        tile, row = ("BLOCK_N * BLOCK_M", "m") if self.dot else ("BLOCK_N", "one")
        inner = "m[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]" if self.dot else "tl.arange(0, BLOCK_N)"
        # Of a tile the tokens that there are: it has room for 16 or more.
        inside = dict.fromkeys(self.sides, "m_inside[None, :]" if self.dot else "")
        size = f"{len(self.sides)} * {tile}"
        places = {side: f"{f'{tile} + ' * i}inner" for i, side in enumerate(self.sides)}
        for i, name in enumerate(self.statistics):
            before = f"{size} + " + ("BLOCK_M + " if self.dot else "1 + ") * i
            places[name] = f"{before}{row}"
        if self.statistics:
            size += f" + {len(self.statistics)}{' * BLOCK_M' if self.dot else ''}"
        e.add("# Every part leaves its sums; the last to arrive adds them in order.", f"inner = {inner}")
        if self.statistics and not self.dot:
            e.add("one = tl.arange(0, 1)")
        e.add(
            f"block = partial + tl.program_id(0).to(tl.int64) * (SPLITS * ({size}))",
            f"own = block + tl.program_id(1) * ({size})",
        )
        for name, place in places.items():
            e.add(f"tl.store(own + {place}, {name}{f', mask={inside[name]}' if inside.get(name) else ''})")
        e.add(
            "tl.debug_barrier()  # the counter follows what all threads stored",
            'before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")',
        )
        with e.block("if before != SPLITS - 1:"):
            e.add("return")
        e.add("tl.debug_barrier()")
        e.add("tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch")
        for name in places:
            shape = ["BLOCK_N"] * (name in self.sides) + ["BLOCK_M"] * self.dot
            e.add(f"{name} = tl.zeros([{', '.join(shape) or '1'}], tl.float32)")
        chunk = min(self.tiling.splits, TOGETHER)
        with (
            e.block(f"for first in range(0, SPLITS, {chunk}):"),
            e.block(f"for part in tl.static_range({chunk}):  # all on their way before the first is added"),
        ):
            e.add(f"other = block + (first + part) * ({size})")
            for name, place in places.items():
                masks = [inside[name]] if inside.get(name) else []
                masks += ["(first + part < SPLITS)"] * (self.tiling.splits % chunk != 0)
                masked = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
                e.add(f'{name} += tl.load(other + {place}{masked}, cache_modifier=".cg")')

    def _norm(self) -> None:
        """The norm of x, applied to what came of x."""
        e, what = self.emitter, self.what
        spread = "[None, :]" if self.dot else ""
        if what.norm == "rms":
            e.add("inverse = tl.rsqrt(squares / K + EPS)")
        elif what.norm == "layer":
            e.add("mean = sums / K", "inverse = tl.rsqrt(tl.maximum(squares / K - mean * mean, 0.0) + EPS)")
            masked = ", mask=n_inside, other=0.0" if self.ragged_n else ""
            for side, row in zip(self.sides, self._row_names, strict=True):
                column = "[:, None]" if self.dot else ""
                e.add(f"{side} -= mean{spread} * tl.load(column_sums + {row}{masked}){column}")
        if what.norm:
            for side in self.sides:
                e.add(f"{side} *= inverse{spread}")

    def _epilogue(self) -> None:
        e, what = self.emitter, self.what
        column = "[:, None]" if self.dot else ""
        n_mask = "n_inside" if self.ragged_n else ""
        masked = f", mask={n_mask}, other=0.0" if n_mask else ""
        e.add("# Epilogue.")
        if what.rounds:
            e.add("x_scale = tl.load(x_scales + m, mask=m_inside, other=0.0)[None, :]")
            for side, row in zip(self.sides, self._row_names, strict=True):
                e.add(f"{side} *= tl.load(scales + {row}{masked})[:, None] * x_scale")
        if what.bias:
            for side, row in zip(self.sides, self._row_names, strict=True):
                e.add(f"{side} += tl.load(bias + {row}{masked}).to(tl.float32){column}")
        if what.rotary is not None:
            rotary_epilogue(e, what.rotary, what.head_norm_eps, dot=self.dot, ragged=self.ragged_n)
            return
        if what.activation:
            e.add("out = activation(gate) * up" if what.pairs else "out = activation(out)")
        place = "m[None, :] * N + n[:, None]" if self.dot else "n"
        masks = [f"{n_mask}[:, None]"] * bool(n_mask) + ["m_inside[None, :]"] if self.dot else [n_mask] * bool(n_mask)
        masked = f", mask={' & '.join(masks)}" if masks else ""
        if what.residual:
            e.add(f"out += tl.load(residual + {place}{masked}).to(tl.float32)")
        e.add(f"tl.store(y + {place}, out{masked})")

    def _more_arguments(self) -> list[str]:
        """Numbers that a launch passes besides."""
        return []

    def _host(self) -> None:
        e, what, tiling = self.emitter, self.what, self.tiling
        blocks = -(-self.columns // tiling.BLOCK_N)
        parameters = [*what.tensors]
        if tiling.splits > 1:
            size = len(self.sides) * tiling.BLOCK_N * self.rows + len(self.statistics) * self.rows
            e.workspace = (blocks * tiling.splits * size, blocks)
            parameters += ["partial", "arrived"]
        arguments = parameters + ["tokens"] * self.dot + self._more_arguments()
        grid = f"({blocks!r}, {tiling.splits!r})" if tiling.splits > 1 else f"({blocks!r},)"
        filled = "y and the slots of the caches" if what.rotary else "y"
        e.host += [
            f"def launch({', '.join(parameters)}, pdl=False):",
            f'    """Fills {filled}; all tensors are contiguous."""',
            f"    tokens = x.numel() // {what.K!r}",
            f"    if not 0 < tokens <= {what.tokens!r}:",
            f'        raise ValueError(f"this kernel takes 1 to {what.tokens!r} tokens, not {{tokens}}")',
            f"    {e.launched(grid, *arguments)}",
        ]
