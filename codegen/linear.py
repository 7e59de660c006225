"""Linear kernels of few tokens: y = x W^T with a norm before, and bias, gate or residual after, in one launch.

The weight is read once, as a stream; what the kernel does besides must hide behind that. A prologue (norm of x), a main loop
(products of one token by multiply-add, of more by tensor cores with the weight as the left operand) and an epilogue compose.
"""

from dataclasses import dataclass

from fuser.codegen.kernel import Emitter, Kernel, activated, element, power_of_two
from fuser.errors import UsageError

MOST_TOKENS = 64


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

    y = x' W^T + bias, x' = rms_norm(x, norm_weight, eps) if `norm_eps` is given. W is [N, K], or [K, N] if `by_input`.
    With `activation`, W holds gate and up side by side and y = activation(gate) * up, [M, N / 2]. With `residual`,
    y += residual, [M, width of y].
    """

    N: int
    K: int
    tokens: int = 1
    dtype: str = "bf16"
    by_input: bool = False
    norm_eps: float | None = None
    norm_weight: bool = True
    bias: bool = False
    activation: str | None = None
    residual: bool = False

    @property
    def width(self) -> int:
        """The width of y."""
        return self.N // 2 if self.activation else self.N

    @property
    def tensors(self) -> list[str]:
        """The kernel's tensors, in the order of `launch`."""
        scale = self.norm_eps is not None and self.norm_weight
        return ["x", *["norm_weight"] * scale, "weight", *["bias"] * self.bias, *["residual"] * self.residual, "y"]


def linear(what: Linear, tiling: Tiling | None = None) -> Kernel:
    """The kernel of `what`: launch(x, [norm_weight,] weight, [bias,] [residual,] y), all contiguous, of `dtype`.

    Raises:
        UsageError: sizes, a dtype, an activation or a tiling that the family does not have.
    """
    tiling = tiling or default_tiling(what)
    if not 1 <= what.tokens <= MOST_TOKENS:
        raise UsageError(f"codegen: a linear of few tokens takes 1 to {MOST_TOKENS}, not {what.tokens}")
    if what.activation and what.N % 2:
        raise UsageError(f"codegen: gate and up side by side have an even width, not {what.N}")
    if tiling.splits < 1 or (tiling.splits - 1) * tiling.BLOCK_K * _steps(what, tiling) >= what.K:
        raise UsageError(f"codegen: K = {what.K} has no {tiling.splits} parts of whole steps of {tiling.BLOCK_K}")
    return _Composition(what, tiling).kernel()


def default_tiling(what: Linear) -> Tiling:
    """A tiling that is good without a search: whole rows of W by wide loads, K in parts where there are few rows."""
    if what.tokens == 1:
        BLOCK_K = min(power_of_two(what.K), 64 if what.by_input else 2048)
        BLOCK_N = 64 if what.by_input else (1 if what.activation else 2)
        splits = _splits(what, BLOCK_N, BLOCK_K) if what.by_input else 1
        return Tiling(BLOCK_N, BLOCK_K, splits, num_warps=4, num_stages=1)
    BLOCK_N = 32 if what.activation else 64
    BLOCK_K = 128 if what.tokens <= 32 else 64
    if what.dtype == "fp32":  # without tensor cores, whose precision is less, operands are held in registers
        BLOCK_N, BLOCK_K = 16, 32
    BLOCK_K = max(min(power_of_two(what.K), BLOCK_K), 16)
    return Tiling(BLOCK_N, BLOCK_K, _splits(what, BLOCK_N, BLOCK_K), num_warps=4, num_stages=4)


def _splits(what: Linear, BLOCK_N: int, BLOCK_K: int) -> int:
    """Parts of K so that some four hundred programs run, each of at least four steps."""
    programs = -(-what.width // BLOCK_N)
    steps = -(-what.K // BLOCK_K)
    wanted = max(min(400 // programs, steps // 4), 1)
    return -(-steps // -(-steps // wanted))


def _steps(what: Linear, tiling: Tiling) -> int:
    """Steps of one part of K."""
    steps = -(-what.K // tiling.BLOCK_K)
    return -(-steps // tiling.splits)


class _Composition:
    """One kernel being composed; each method adds one part of its body."""

    def __init__(self, what: Linear, tiling: Tiling) -> None:
        self.what, self.tiling = what, tiling
        self.dot = what.tokens > 1
        self.rows = max(power_of_two(what.tokens), 16) if self.dot else 1
        self.sides = ("gate", "up") if what.activation else ("out",)
        self.ragged_n = what.width % tiling.BLOCK_N != 0
        self.ragged_k = what.K % tiling.BLOCK_K != 0 or (what.K // tiling.BLOCK_K) % tiling.splits != 0
        # The sum of squares is taken beside the product and divides it afterwards, which hides its cost. Where x times
        # the norm's weight could overflow, or a part of K sees a part of x, it is taken before, from cached x.
        self.normed = what.norm_eps is not None
        self.norm_first = self.normed and (tiling.splits > 1 or (self.dot and what.dtype == "fp16"))
        self.emitter = self._emitter()

    def _emitter(self) -> Emitter:
        what, tiling = self.what, self.tiling
        norm = "rms_norm(x)" if self.normed else "x"
        product = f"{norm} W^T{' + bias' if what.bias else ''}"
        value = f"{what.activation}(gate) * up, (gate, up) = {product}" if what.activation else product
        shape = f"[{what.K}, {what.N}]" if what.by_input else f"[{what.N}, {what.K}]"
        summary = f"y = {value}{' + residual' if what.residual else ''} for at most {what.tokens} tokens, W {shape}."
        grid = "Grid: (blocks of columns of y,)."
        work = (
            f"One program computes {tiling.BLOCK_N} columns of y for every token, {tiling.BLOCK_K} columns of x a step."
        )
        if tiling.splits > 1:
            grid = f"Grid: (blocks of columns of y, {tiling.splits} parts of K)."
            work += (
                "\nThe last of a block's parts to arrive adds them all, in their order, so results repeat bit by bit."
            )
        how = "by tensor cores" if self.dot else "by multiply-add"
        details = (grid, *work.splitlines(), f"Products {how}, sums in float32, rounded once.")
        e = Emitter("linear", summary, details, {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages})
        for tensor in what.tensors:
            e.pointer(tensor, element(what.dtype))
        if tiling.splits > 1:
            e.pointer("partial", "fp32")
            e.pointer("arrived", "i32")
        if self.dot:
            e.integer("tokens")
        e.constant(N=what.width, K=what.K, BLOCK_N=tiling.BLOCK_N, BLOCK_K=tiling.BLOCK_K)
        if self.dot:
            e.constant(BLOCK_M=self.rows)
        if self.normed:
            e.constant(EPS=what.norm_eps)
        if tiling.splits > 1:
            e.constant(SPLITS=tiling.splits, PART=_steps(what, tiling) * tiling.BLOCK_K)
        if what.activation:
            activated(e, what.activation)
        return e

    def kernel(self) -> Kernel:
        """The whole of it."""
        self._places()
        if self.norm_first:
            self._norm_first()
        self._main_loop()
        if self.tiling.splits > 1:
            self._combine()
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
        for side, first in zip(self.sides, ("n", "(N + n)"), strict=False):
            rows = f"{first}" if self.what.by_input else f"{first}.to(tl.int64) * K"
            e.add(f"{side}_rows = weight + {rows}")

    def _load_x(self) -> None:
        """x as [BLOCK_K, BLOCK_M], or [1, BLOCK_K]: the right operand."""
        if self.dot:
            mask = "m_inside[None, :]" + (" & k_inside[:, None]" if self.ragged_k else "")
            place = "x + m[None, :] * K + k[:, None]"
        else:
            mask = "k_inside[None, :]" if self.ragged_k else ""
            place = "x + k[None, :]"
        masked = f", mask={mask}, other=0.0" if mask else ""
        self.emitter.add(f'a = tl.load({place}{masked}, eviction_policy="evict_last")')

    def _k(self, bound: str) -> None:
        self.emitter.add("k = step + tl.arange(0, BLOCK_K)")
        if self.ragged_k:
            self.emitter.add(f"k_inside = k < {bound}")

    def _norm_first(self) -> None:
        e = self.emitter
        shape = "[BLOCK_K, BLOCK_M]" if self.dot else "[1, BLOCK_K]"
        e.add("# Prologue: one over the root mean square of every token.", f"squares = tl.zeros({shape}, tl.float32)")
        with e.block("for step in range(0, K, BLOCK_K):"):
            self._k("K")
            self._load_x()
            e.add("squares += a.to(tl.float32) * a.to(tl.float32)")
        e.add(f"inverse = tl.rsqrt(tl.sum(squares, {0 if self.dot else 1}) / K + EPS)")

    def _main_loop(self) -> None:
        e, what = self.emitter, self.what
        shape = "[BLOCK_N, BLOCK_M]" if self.dot else "[BLOCK_N, BLOCK_K]"
        e.add("# Main loop: W streams by, x stays in the cache.")
        for side in self.sides:
            e.add(f"{side} = tl.zeros({shape}, tl.float32)")
        if self.normed and not self.norm_first:
            e.add(f"squares = tl.zeros({'[BLOCK_K, BLOCK_M]' if self.dot else '[1, BLOCK_K]'}, tl.float32)")
        first, last = "0", "K"
        if self.tiling.splits > 1:
            e.add("begin = tl.program_id(1) * PART", "end = tl.minimum(begin + PART, K)")
            first, last = "begin", "end"
        few = self.tiling.splits == 1 and not self.dot and -(-what.K // self.tiling.BLOCK_K) <= 4
        loop = "tl.static_range" if few else "range"  # unrolled, all loads are in flight at once
        with e.block(f"for step in {loop}({first}, {last}, BLOCK_K):"):
            self._k(last)
            for side in self.sides:
                self._load_weight(side)
            self._load_x()
            self._scale_x()
            for side in self.sides:
                if self.dot:
                    exact = ', input_precision="ieee"' if what.dtype == "fp32" else ""
                    e.add(f"{side} = tl.dot({side}_tile, a, {side}{exact})")
                else:
                    e.add(f"{side} += {side}_tile.to(tl.float32) * a")
        if not self.dot:
            for side in self.sides:
                e.add(f"{side} = tl.sum({side}, 1)")
        if self.normed and not self.norm_first:
            e.add(f"inverse = tl.rsqrt(tl.sum(squares, {0 if self.dot else 1}) / K + EPS)")
            for side in self.sides:
                e.add(f"{side} *= inverse{'[None, :]' if self.dot else ''}")

    def _load_weight(self, side: str) -> None:
        columns = f"k[None, :].to(tl.int64) * {self.what.N!r}" if self.what.by_input else "k[None, :]"
        masks = ["n_inside[:, None]"] * self.ragged_n + ["k_inside[None, :]"] * self.ragged_k
        masked = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        self.emitter.add(
            f'{side}_tile = tl.load({side}_rows[:, None] + {columns}{masked}, eviction_policy="evict_first")'
        )

    def _scale_x(self) -> None:
        e = self.emitter
        if not self.normed:
            if not self.dot:
                e.add("a = a.to(tl.float32)")
            return
        e.add("a = a.to(tl.float32)")
        if self.norm_first:
            e.add(f"a *= inverse{'[None, :]' if self.dot else ''}")
        else:
            e.add("squares += a * a")
        if self.what.norm_weight:
            mask = ", mask=k_inside, other=0.0" if self.ragged_k else ""
            spread = "[:, None]" if self.dot else "[None, :]"
            e.add(f"a *= tl.load(norm_weight + k{mask}).to(tl.float32){spread}")
        if self.dot:
            e.add("a = a.to(x.dtype.element_ty)")

    def _combine(self) -> None:
        e = self.emitter
        tile = "[BLOCK_N, BLOCK_M]" if self.dot else "[BLOCK_N]"
        size = "BLOCK_N * BLOCK_M" if self.dot else "BLOCK_N"
        sides = len(self.sides)
        inner = "tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]" if self.dot else "tl.arange(0, BLOCK_N)"
        e.add(
            "# Every part leaves its sums; the last to arrive adds them in order.",
            f"inner = {inner}",
            f"block = partial + tl.program_id(0).to(tl.int64) * (SPLITS * {sides} * {size})",
        )
        for i, side in enumerate(self.sides):
            e.add(f"tl.store(block + (tl.program_id(1) * {sides} + {i}) * {size} + inner, {side})")
        e.add(
            "tl.debug_barrier()  # the counter follows what all threads stored",
            'before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")',
        )
        with e.block("if before != SPLITS - 1:"):
            e.add("return")
        e.add("tl.debug_barrier()")
        e.add("tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch")
        for side in self.sides:
            e.add(f"{side} = tl.zeros({tile}, tl.float32)")
        with e.block("for part in range(SPLITS):"):
            for i, side in enumerate(self.sides):
                e.add(f'{side} += tl.load(block + (part * {sides} + {i}) * {size} + inner, cache_modifier=".cg")')

    def _epilogue(self) -> None:
        e, what = self.emitter, self.what
        column = "[:, None]" if self.dot else ""
        n_mask = "n_inside" if self.ragged_n else ""
        masked = f", mask={n_mask}" if n_mask else ""
        e.add("# Epilogue.")
        if what.bias:
            for side, first in zip(self.sides, ("n", "N + n"), strict=False):
                e.add(f"{side} += tl.load(bias + {first}{masked}).to(tl.float32){column}")
        if what.activation:
            e.add("out = activation(gate) * up")
        place = "m[None, :] * N + n[:, None]" if self.dot else "n"
        masks = [f"{n_mask}[:, None]"] * bool(n_mask) + ["m_inside[None, :]"] if self.dot else [n_mask] * bool(n_mask)
        masked = f", mask={' & '.join(masks)}" if masks else ""
        if what.residual:
            e.add(f"out += tl.load(residual + {place}{masked}).to(tl.float32)")
        e.add(f"tl.store(y + {place}, out{masked})")

    def _host(self) -> None:
        e, what, tiling = self.emitter, self.what, self.tiling
        blocks = -(-what.width // tiling.BLOCK_N)
        arguments = list(what.tensors)
        lines = [
            f"def launch({', '.join(what.tensors)}):",
            '    """Fills y; all tensors are contiguous. Scratch is kept, so launches of a device must follow one another."""'
            if tiling.splits > 1
            else '    """Fills y; all tensors are contiguous."""',
            f"    tokens = x.numel() // {what.K!r}",
            f"    if not 0 < tokens <= {what.tokens!r}:",
            f'        raise ValueError(f"this kernel takes 1 to {what.tokens!r} tokens, not {{tokens}}")',
        ]
        if tiling.splits > 1:
            size = tiling.splits * len(self.sides) * tiling.BLOCK_N * self.rows
            e.host += ["SCRATCH = {}  # by device: the parts' sums, and how many have arrived", "", ""]
            lines += [
                "    if x.device not in SCRATCH:",
                "        SCRATCH[x.device] = (",
                f"            torch.empty({blocks * size!r}, dtype=torch.float32, device=x.device),",
                f"            torch.zeros({blocks!r}, dtype=torch.int32, device=x.device),",
                "        )",
            ]
            arguments += ["*SCRATCH[x.device]"]
        arguments += ["tokens"] * self.dot
        grid = f"({blocks!r}, {tiling.splits!r})" if tiling.splits > 1 else f"({blocks!r},)"
        e.host += [*lines, f"    {e.launched(grid, *arguments)}"]
