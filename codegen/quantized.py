"""Linear kernels whose weight is codes: dequantized in registers, on the way from memory to the tensor cores.

The weight lies in the order in which threads hold it: units of 16 rows, in each steps of 512 / bits columns of K, in each 2 x 8
rows (r, r + 8) of 16 words. Where a kernel's columns have two rows each (gate and up, what turns together), r is of the
first and r + 8 of the second, so that one thread sums both. Of a row's word 4 t + j the two halves hold the columns
32 j + 8 p + 2 t and the one after (of 8-bit codes 16 j + 8 p + 2 t), p the place within the half, lowest first: what
thread t of a row gives to a product of tensor cores, so that nothing is moved between threads.
What becomes of a word is told in codegen/code_values.py.
"""

from dataclasses import dataclass

from fuser.codegen.code_values import EXPONENTS, HALVES, columns, parts, values
from fuser.codegen.kernel import Emitter, Kernel
from fuser.codegen.linear import Composition, Linear, Tiling, checked, rows_of
from fuser.errors import UsageError

UNIT = 16  # rows of W that a product of tensor cores takes together


class _Codes:
    """What kernels that read codes have in common: where they are, and how a step becomes numbers."""

    def __init__(self, e: Emitter, what: Linear, sides: int, columns_n: int, BLOCK_N: int) -> None:
        assert what.format is not None
        self.e, self.what, self.format, self.rows = e, what, what.format, sides * BLOCK_N
        self.C, self.parts = columns(what.format), parts(what.format)
        self.steps = -(-what.K // self.C)
        self.units = -(-columns_n * sides // UNIT)
        self.ragged_n = columns_n % BLOCK_N != 0
        self.ragged_k = what.K % self.C != 0
        self.group = what.format.grouped(what.K) if what.format.group and what.format.group < what.K else None
        self.per = self.group // self.C if self.group and self.group > self.C else 1
        remains = EXPONENTS[what.dtype][1]
        self.factor = 2.0**-remains if what.format.kind != "nf4" else 1.0
        self.looks_up = what.format.kind == "nf4"

    def declare(self) -> None:
        e = self.e
        e.constant(STEPS=self.steps, UNITS=self.units, ROWS=self.rows)
        values(e, self.format, self.what.dtype)

    def places(self) -> None:
        """The rows of words that a program reads, in the order in which its threads hold them."""
        e = self.e
        e.add(
            "row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
            "i = tl.arange(0, ROWS)",
            "unit = tl.program_id(0) * (ROWS // 16) + i // 8 % (ROWS // 16)",
            "within = i // (ROWS // 2) * 8 + i % 8",
            "words = weight + unit * (STEPS * 256) + within * 16",
            "word = tl.arange(0, 16)",
        )

    def ready(self) -> None:
        """What values are looked up in, made before other launches are waited for."""
        if self.looks_up:
            self.e.add("start, lane = 0, 0")
            with self.e.block("if NATIVE:"):
                self.e.add("start, lane = table()")

    def load(self, step: str, target: str) -> None:
        """The words of a step. Past the last step it is any: x is zero there."""
        masked = ", mask=(unit < UNITS)[:, None], other=0" if self.ragged_n else ""
        self.e.add(
            f'{target} = tl.load(words[:, None] + {step} * 256 + word[None, :]{masked}, eviction_policy="evict_first")'
        )

    def group_of(self, step: str, part: int) -> str:
        if self.group is None:
            return "0"
        if self.parts > 1:
            return f"({step} * {self.parts} + {part})"
        return f"({step} // {self.per})" if self.per > 1 else step

    def load_scales(self, step: str, part: int, suffix: str) -> None:
        """Scales, and zeros, of one part of a step: those as sums lie, these as words do."""
        group = f"{self.group_of(step, part)} * (UNITS * 16)"
        if self.group is not None:
            self.e.add(f"scale{suffix} = tl.load(scales + {group} + row{self._inside('row // 16')})")
        if not self.format.symmetric:
            self.e.add(f"zero{suffix} = tl.load(zeros + {group} + unit * 16 + within{self._inside('unit')})")

    def load_channel_scales(self) -> None:
        """The one scale of each row."""
        self.e.add(f"scale = tl.load(scales + row{self._inside('row // 16')})")

    def _inside(self, unit: str) -> str:
        return f", mask={unit} < UNITS, other=0.0" if self.ragged_n else ""

    def scaled(self, suffix: str = "") -> str:
        """A factor of each row's sum."""
        return f"(scale{suffix}.to(tl.float32) * {self.factor!r})[:, None]"

    def split(self, words: str) -> list[str]:
        """Names of the words of each part."""
        e = self.e
        if self.parts == 1:
            return [words]
        if self.parts == 2:
            names = [f"{words}_0", f"{words}_1"]
            e.add(f"{names[0]}, {names[1]} = halved({words})")
            return names
        e.add(f"{words}_a, {words}_b = halved({words})")
        names = [f"{words}_{part}" for part in range(4)]
        e.add(f"{names[0]}, {names[1]} = halved({words}_a)", f"{names[2]}, {names[3]} = halved({words}_b)")
        return names

    def value(self, words: str, suffix: str) -> str:
        zero = f", zero{suffix}" if not self.format.symmetric else ""
        return f"values({words}, start, lane, NATIVE)" if self.looks_up else f"values({words}, lowest{zero})"

    def declare_last(self) -> None:
        """A run-time number: were it known, the compiler would take halves of words apart."""
        if not self.looks_up:
            self.e.integer("lowest")

    def arguments(self, tensor: str) -> list[str]:
        """What a launch passes besides."""
        return [f"NATIVE={tensor}.is_cuda"] if self.looks_up else [f"0x{HALVES[self.format.bits]:X}"]


def quantized_linear(what: Linear, tiling: Tiling | None = None) -> Kernel:
    """The kernel of a `what` with a format, as `linear` gives it."""
    return _Quantized(what, tiling or default_tiling(what)).kernel()


def default_tiling(what: Linear) -> Tiling:
    """A tiling that is good without a search: `BLOCK_K` is one step; with one stage all steps of a part are loaded at once."""
    assert what.format is not None
    whole_head = what.rotary.head_dim // 2 if what.rotary is not None and what.head_norm_eps is not None else 0
    C = columns(what.format)
    steps = -(-what.K // C)
    share = what.N // 2 if what.pairs or what.rotary is not None else what.N
    sides = 2 if what.pairs or what.rotary is not None else 1
    BLOCK_N = whole_head or (32 if sides == 2 and what.tokens > 32 else 64)  # whose sums the registers hold
    blocks = -(-share // BLOCK_N)
    if what.tokens == 1:
        held = max(256 // C // sides, 1)  # steps of a part
        return Tiling(BLOCK_N, C, _parts_of(steps, held), 4, 1)
    wanted = max(min(-(-(264 if what.tokens <= 16 else 396) // blocks), steps // 4), 1)
    return Tiling(BLOCK_N, C, _parts_of(steps, -(-steps // wanted)), 4, 4)


def _parts_of(steps: int, held: int) -> int:
    """Parts of K of so many steps each, the last one perhaps shorter."""
    return -(-steps // held)


class _Quantized(Composition):
    """One kernel being composed: places, main loop and emitter are those of codes, the rest is any linear's."""

    def __init__(self, what: Linear, tiling: Tiling) -> None:
        assert what.format is not None
        if what.dtype not in EXPONENTS:
            raise UsageError(f"codegen: a product with codes computes in {', '.join(EXPONENTS)}, not {what.dtype}")
        checked(what, tiling)
        super().__init__(what, tiling)
        rows = tiling.BLOCK_N * len(self.sides)
        if what.rounds or columns(what.format) != tiling.BLOCK_K or rows % UNIT or what.by_input:
            raise UsageError(
                f"codegen: a product with codes takes {columns(what.format)} columns a step and rows by {UNIT}, not {tiling}"
            )
        self.held = -(-self.codes.steps // tiling.splits)
        if tiling.num_stages == 1 and self.held > 8:
            raise UsageError(f"codegen: registers hold 8 steps of codes at most, not {self.held}")
        if (tiling.splits - 1) * self.held >= self.codes.steps:
            raise UsageError(f"codegen: {self.codes.steps} steps have no {tiling.splits} parts")

    def _emitter(self) -> Emitter:
        e = super()._emitter()
        self.codes = _Codes(e, self.what, len(self.sides), self.columns, self.tiling.BLOCK_N)
        self.codes.declare_last()
        e.constants.pop("PART", None)
        self.codes.declare()
        return e

    def _row_pointers(self) -> None:
        self.codes.places()

    @property
    def _width(self) -> int:
        return self.codes.C // self.codes.parts

    def _main_loop(self) -> None:
        e, codes = self.emitter, self.codes
        e.add("# Main loop: codes stream by, x stays in the cache.")
        e.add("sums = tl.zeros([ROWS, BLOCK_M], tl.float32)", f"columns = tl.arange(0, {self._width})")
        begin = f"tl.program_id(1) * {self.held}" if self.tiling.splits > 1 else "0"
        if self.tiling.num_stages == 1:
            self._unrolled_codes(begin)
        else:
            self._looped_codes(begin)
        if codes.group is None:
            e.add("# One scale a row.")
            codes.load_channel_scales()
            e.add(f"sums *= {codes.scaled()}")
        if len(self.sides) == 1:
            e.add(f"{self.sides[0]} = sums")
            return
        first, second = self.sides
        e.add(
            f"{first}, {second} = tl.split(sums.reshape(ROWS // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))",
            f"{first} = {first}.reshape(BLOCK_N, BLOCK_M)",
            f"{second} = {second}.reshape(BLOCK_N, BLOCK_M)",
        )

    def _unrolled_codes(self, begin: str) -> None:
        """All loads of a part before anything is waited for."""
        e, codes = self.emitter, self.codes
        e.add(f"begin = {begin}")
        uneven = self.held * self.tiling.splits != codes.steps
        places = [f"tl.minimum(begin + {j}, STEPS - 1)" if uneven else f"(begin + {j})" for j in range(self.held)]
        for j, place in enumerate(places):
            codes.load(place, f"tile_{j}")
        for j, place in enumerate(places):
            for part in range(codes.parts):
                codes.load_scales(place, part, f"_{j}_{part}")
        codes.ready()
        e.wait()
        for j in range(self.held):
            for part in range(codes.parts):
                self._load_part(f"(begin + {j})", part, f"_{j}_{part}", checked=uneven or codes.ragged_k)
        for j in range(self.held):
            for part, words in enumerate(codes.split(f"tile_{j}")):
                self._multiply_codes(words, f"_{j}_{part}")

    def _looped_codes(self, begin: str) -> None:
        """Words are on their way some steps before they are needed, scales one step."""
        e, codes = self.emitter, self.codes
        end = "STEPS"
        if self.tiling.splits > 1:
            e.add(f"begin = {begin}", f"end = tl.minimum(begin + {self.held}, STEPS)")
            begin, end = "begin", "end"
        scaled = codes.group is not None or not codes.format.symmetric
        suffixes = [f"_{part}" for part in range(codes.parts)]
        if scaled:
            for part, suffix in enumerate(suffixes):
                codes.load_scales(begin, part, suffix)
        codes.ready()
        e.wait()
        with e.block(f"for step in range({begin}, {end}):"):
            codes.load("step", "tile")
            for part, suffix in enumerate(suffixes):
                self._load_part("step", part, suffix, checked=codes.ragged_k)
            if scaled:
                e.add("following = tl.minimum(step + 1, STEPS - 1)")
                for part, suffix in enumerate(suffixes):
                    codes.load_scales("following", part, f"{suffix}_next")
            for words, suffix in zip(codes.split("tile"), suffixes, strict=True):
                self._multiply_codes(words, suffix)
            for suffix in suffixes if scaled else ():
                if codes.group is not None:
                    e.add(f"scale{suffix} = scale{suffix}_next")
                if not codes.format.symmetric:
                    e.add(f"zero{suffix} = zero{suffix}_next")

    def _load_part(self, step: str, part: int, suffix: str, *, checked: bool) -> None:
        """x of one part of a step, [columns, BLOCK_M]."""
        e, codes = self.emitter, self.codes
        width = self._width
        start = f"{step} * {codes.C}" + (f" + {part * width}" if part else "")
        e.add(f"k = {start} + columns")
        inside = " & (k < K)[:, None]" if checked else ""
        e.add(
            f"x{suffix} = tl.load(x + m[None, :] * K + k[:, None], mask=m_inside[None, :]{inside}, other=0.0, "
            'eviction_policy="evict_last")'
        )

    def _multiply_codes(self, words: str, suffix: str) -> None:
        e, codes = self.emitter, self.codes
        made = codes.value(words, suffix)
        if codes.group is None:
            e.add(f"sums = tl.dot({made}, x{suffix}, sums)")
        else:
            e.add(f"sums += tl.dot({made}, x{suffix}) * {codes.scaled(suffix)}")

    def _more_arguments(self) -> list[str]:
        return self.codes.arguments("x")


def order_of(what: Linear) -> tuple[object, ...]:
    """What the order of rows in a kernel's codes depends on."""
    r = what.rotary
    if r is not None:
        return r.heads + 2 * r.kv_heads, r.head_dim, r.rotary_dim, r.interleaved
    return (what.pairs,)


def sides_of(what: Linear) -> list[list[int]]:
    """The rows of W that each side of a kernel has, by its columns."""
    r = what.rotary
    if r is None:
        half = what.N // 2
        return [[*range(half)], [*range(half, what.N)]] if what.pairs else [[*range(what.N)]]
    half, R = r.head_dim // 2, r.rotary_dim // 2
    pairs = range(half)
    if r.interleaved:
        places = [2 * i for i in pairs], [2 * i + 1 for i in pairs]
    else:  # what does not turn is in pairs of its own, after both halves of what does
        places = [i if i < R else R + i for i in pairs], [R + i if i < R else half + i for i in pairs]
    heads = range(0, what.N, r.head_dim)
    return [[head + place for head in heads for place in side] for side in places]


@dataclass(frozen=True)
class Dequantize:
    """What a kernel that undoes a weight's codes computes: y [N, K] = W, its rows in their own order.

    `linear`: the product whose kernel reads the same codes.
    """

    linear: Linear


def dequantize(what: Dequantize) -> Kernel:
    """The kernel of `what`: launch(weight, scales, [zeros,] y)."""
    of = what.linear
    assert of.format is not None
    e = Emitter(
        "dequantize",
        f"y = W [{of.N}, {of.K}], of {of.format.bits}-bit codes.",
        (
            "Grid: (blocks of rows, steps of K).",
            "One program makes 64 rows of one step. Numbers in float32, rounded once.",
        ),
        {"num_warps": 4, "num_stages": 1},
    )
    sides = 2 if of.pairs or of.rotary is not None else 1
    share = of.N // sides
    codes = _Codes(e, of, sides, share, 64 // sides)
    e.pointer("weight", "i32")
    e.pointer("scales", of.scale_dtype)
    if not of.format.symmetric:
        e.pointer("zeros", of.dtype)
    e.pointer("y", of.dtype)
    codes.declare_last()
    e.constant(N=share, K=of.K)
    if of.rotary is not None:
        e.constant(D=of.rotary.head_dim, R=of.rotary.rotary_dim // 2)
    codes.declare()
    e.begin(waits=True)
    e.add("step = tl.program_id(1)")
    codes.places()
    codes.ready()
    e.add("n = row" if sides == 1 else "n = row // 16 * 8 + row % 8")
    if codes.ragged_n:
        e.add("n_inside = n < N")
    names = rows_of(e, of)
    place = names[0] if sides == 1 else f"tl.where(row % 16 < 8, {names[0]}, {names[1]})"
    e.add(f"target = y + {place}.to(tl.int64)[:, None] * K")
    width = codes.C // codes.parts
    if codes.group is None:
        codes.load_channel_scales()
    for part in range(codes.parts):
        codes.load_scales("step", part, f"_{part}")
    codes.load("step", "tile")
    for part, words in enumerate(codes.split("tile")):
        scale = codes.scaled("" if codes.group is None else f"_{part}")
        e.add(f"made = {codes.value(words, f'_{part}')}.to(tl.float32) * {scale}")
        e.add(f"k = step * {codes.C} + {part * width} + tl.arange(0, {width})")
        masks = ["n_inside[:, None]"] * codes.ragged_n + ["(k < K)[None, :]"] * codes.ragged_k
        masked = f", mask={' & '.join(masks)}" if masks else ""
        e.add(f"tl.store(target + k[None, :], made{masked})")
    tensors = ["weight", "scales", *["zeros"] * (not of.format.symmetric), "y"]
    e.host += [
        f"def launch({', '.join(tensors)}, pdl=False):",
        '    """Fills y."""',
        f"    {e.launched(f'({-(-codes.units // 4)!r}, {codes.steps!r})', *tensors, *codes.arguments('y'))}",
    ]
    return e.kernel()
