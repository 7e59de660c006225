"""How attention reads pages of int8, without a dequantized copy of them anywhere.

Codes are loaded two at a time, as integers of 16 bits, so that their tiles lie in registers as those of float16 do: even and
odd channels are products of their own. A code is exact in float16. No element is multiplied by its scale: a key's scale
multiplies its score, a value's the softmax weight, and a head of several groups is that many products.
"""

from fuser.codegen.kernel import Emitter, power_of_two
from fuser.codegen.kv_groups import checked_group

CODES = '''
@triton.jit
def codes_of(pairs, PACKED: tl.constexpr):
    """The even and the odd codes of pairs in float16: 0x6480 + code is 1152 + code there."""
    if PACKED:  # two pairs in a register, which compilers take apart
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 biased, offset;
            xor.b32 biased, $2, 0x80808080;
            mov.b32 offset, 0x64806480;
            prmt.b32 $0, biased, 0x64646464, 0x4240;
            prmt.b32 $1, biased, 0x64646464, 0x4341;
            sub.f16x2 $0, $0, offset;
            sub.f16x2 $1, $1, offset;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    even = ((pairs & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    odd = (((pairs >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    return even, odd
'''


class Int8Pages:
    """The parts of an attention kernel's body that depend on how pages hold keys and values."""

    def __init__(self, emitter: Emitter, head_dim: int, kv_group: int, dtype: str) -> None:
        self.emitter, self.dtype = emitter, dtype
        self.group = checked_group(kv_group, head_dim)
        groups = head_dim // self.group
        self.ends = [f"_{j}" for j in range(groups)] if groups > 1 else [""]
        self.block = max(power_of_two(self.group // 2), 16)
        self.padded = self.block != self.group // 2
        self.exact = ', input_precision="ieee"' if dtype == "fp32" else ""
        self.wide = ".to(tl.float32)" if dtype == "fp32" else ""
        emitter.constant(GROUPS=groups, PAIRS=self.group // 2, BLOCK_PAIRS=self.block, PACKED=True)
        if not self.wide:
            emitter.constant(SHIFT=16.0)  # keeps weights times small scales normal in float16
        emitter.part(CODES)

    @property
    def tiles(self) -> list[tuple[str, str]]:
        """The end of the names of each tile of channels, and its channels."""
        return [
            (f"_{parity}{end}", f"({f'{2 * j} * PAIRS + ' if j else ''}2 * pair{' + 1' if parity == 'odd' else ''})")
            for j, end in enumerate(self.ends) for parity in ("even", "odd")
        ]  # fmt: skip

    def begin(self) -> None:
        """Queries, and sums of nothing. Queries of bfloat16 are divided by a row's largest, to fit float16."""
        e = self.emitter
        e.add("pair = tl.arange(0, BLOCK_PAIRS)")
        e.add("inside = row_inside[:, None]" + (" & (pair < PAIRS)[None, :]" if self.padded else ""))
        for end, channels in self.tiles:
            e.add(f"queries{end} = tl.load(q + rows[:, None] + {channels}[None, :], mask=inside, other=0.0)")
        if self.dtype == "bf16":
            e.add("# Divided by a row's largest they fit float16.", "largest = tl.zeros([BLOCK_M], tl.float32)")
            for end, _ in self.tiles:
                e.add(f"largest = tl.maximum(largest, tl.max(tl.abs(queries{end}.to(tl.float32)), 1))")
            e.add("largest = tl.where(largest > 0.0, largest, 1.0)")
            for end, _ in self.tiles:
                e.add(f"queries{end} = (queries{end}.to(tl.float32) / largest[:, None]).to(tl.float16)")
            e.add("row_scale = largest * SCALE")
        for end, _ in self.tiles:
            e.add(f"acc{end} = tl.zeros([BLOCK_M, BLOCK_PAIRS], tl.float32)")

    @property
    def scales(self) -> tuple[str, str]:
        """What multiplies scores [rows, keys], and what their maxima [rows]."""
        return ("row_scale[:, None]", "row_scale") if self.dtype == "bf16" else ("SCALE", "SCALE")

    def load(self, offset: str, *, masked: bool) -> None:
        """Codes, as pairs, of a step's keys and values, of `block`, at `offset` of their page."""
        e = self.emitter
        inside = ["t_inside[:, None]"] * masked + ["(pair < PAIRS)[None, :]"] * self.padded
        mask = f", mask={' & '.join(inside)}, other=0" if inside else ""
        e.add(
            "block = block.to(tl.int64) if WIDE else block",
            f"offset = {offset}",
            "place = ((block * PAGE + offset) * G + g)[:, None] * (GROUPS * PAIRS) + pair[None, :]",
        )
        for side in ("key", "value"):
            for j, end in enumerate(self.ends):
                more = f" + {j} * PAIRS" if j else ""
                e.add(f"{side}s{end} = tl.load({side[0]}_cache + place{more}{mask})")

    def first_scales(self, page: str, next_page: str) -> None:
        """The scales of the first step and the page of the next one."""
        e = self.emitter
        e.add(
            "# No copy engine takes as little as a scale: it is loaded one step before it is needed, and its page two.",
            "t = start + tl.arange(0, BLOCK_T)",
            f"near = {page}",
        )
        self._load_scales("t % PAGE")
        e.add(f"near = {next_page}")

    def next_scales(self, page: str, *, masked: bool) -> None:
        """The scales of this step, on the way since the last one; those of the next one, and the `page` of the one after."""
        e = self.emitter
        for side in ("key", "value"):
            for end in self.ends:
                ready = f"{side}_near{end}.to(tl.float32)"
                e.add(f"{side}_scale{end} = {f'tl.where(t_inside, {ready}, 0.0)' if masked else ready}")
        self._load_scales("(t + BLOCK_T) % PAGE")
        e.add(f"near = {page}")

    def _load_scales(self, offset: str) -> None:
        e = self.emitter
        e.add(f"scale_place = ((near.to(tl.int64) if WIDE else near) * G + g) * (GROUPS * PAGE) + {offset}")
        for side in ("key", "value"):
            for j, end in enumerate(self.ends):
                e.add(f"{side}_near{end} = tl.load({side[0]}_scale + scale_place{f' + {j} * PAGE' if j else ''})")

    def scores(self) -> None:
        """Products with the codes of keys, times their scales."""
        e = self.emitter
        for j, end in enumerate(self.ends):
            e.add(
                f"even, odd = codes_of(keys{end}, PACKED)",
                f"product = tl.dot(queries_even{end}, tl.trans(even{self.wide}){self.exact})",
                f"product = tl.dot(queries_odd{end}, tl.trans(odd{self.wide}), product{self.exact})",
                f"scores {'+=' if j else '='} product * key_scale{end}[None, :]",
            )

    def accumulate(self) -> None:
        """Adds the codes of values by weights times their scales."""
        e = self.emitter
        element = "tl.float32" if self.wide else "tl.float16"
        for end in self.ends:
            shift = "" if self.wide else " * SHIFT"
            e.add(
                f"even, odd = codes_of(values{end}, PACKED)",
                f"shares = (weights * (value_scale{end}{shift})[None, :]).to({element})",
            )
            for parity in ("even", "odd"):
                acc = f"acc_{parity}{end}"
                e.add(f"{acc} = tl.dot(shares, {parity}{self.wide}, {acc} * decay[:, None]{self.exact})")

    def end(self) -> None:
        """The sums as they are."""
        if not self.wide:
            self.emitter.add(*(f"acc{end} *= 1.0 / SHIFT" for end, _ in self.tiles))
