"""Rotary embedding of queries and keys and the write of keys and values into a paged cache, in one launch."""

from dataclasses import dataclass

from fuser.codegen.kernel import Emitter, Kernel, element, power_of_two
from fuser.codegen.kv_groups import checked_group, group_constants, quantizes
from fuser.errors import UsageError


@dataclass(frozen=True)
class Rotary:
    """What a rotary cache-write kernel computes, for the tokens of a step, of any sequences.

    The first `rotary_dim` channels (perhaps none) of every head of q and k turn by the angles of the token's position;
    pairs are (i, i + R), or (2i, 2i + 1) when interleaved. Keys and values go to the token's slot: given, or with
    `by_block_table` looked up. With `kv_group` they are int8 there: by groups of so many channels of a head, a scale each.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    page: int = 16
    interleaved: bool = False
    by_block_table: bool = False
    dtype: str = "bf16"
    table_dtype: str = "fp32"
    kv_group: int = 0

    @property
    def tensors(self) -> list[str]:
        """The kernel's tensors, in the order of `launch`."""
        where = ["sequences", "block_table"] if self.by_block_table else ["slot_mapping"]
        tables = ["cos", "sin"] * (self.rotary_dim > 0)
        return ["q", "k", "v", *tables, "positions", *where, "turned", *self.caches]

    @property
    def caches(self) -> list[str]:
        """The tensors that hold keys and values."""
        return ["k_cache", "v_cache", *["k_scale", "v_scale"] * bool(self.kv_group)]

    def kind(self, tensor: str) -> str:
        """The element type of a tensor, as Triton names it."""
        if tensor in ("positions", "slot_mapping", "sequences", "block_table"):
            return "i32"
        if self.kv_group and tensor in self.caches:
            return "i8" if tensor.endswith("cache") else "fp16"
        return element(self.table_dtype if tensor in ("cos", "sin") else self.dtype)


def rotary_cache_write(what: Rotary, *, BLOCK_H: int = 4, num_warps: int = 2) -> Kernel:
    """The kernel of `what`.

    launch(q, k, v, cos, sin, positions, slot_mapping | sequences, block_table, turned, k_cache, v_cache): q [tokens, H Dh],
    k, v [tokens, G Dh], rows perhaps strided (parts of one product); cos, sin [positions, R] of `table_dtype`; positions,
    slot_mapping, sequences [tokens] int32; block_table [sequences, blocks] int32; turned [tokens, H, Dh]; the caches
    [blocks, page, G, Dh]. A token of slot -1 (of sequence -1) is written nowhere, its query is turned. With `kv_group` the
    caches are int8, and k_scale, v_scale [blocks, G, Dh / kv_group, page] float16 follow them, a page's scales of one group
    side by side for who reads them: a group's scale is its largest absolute value / 127, a code the nearest to x / scale;
    of a group that is not finite the scale is NaN.

    Raises:
        UsageError: heads, widths or dtypes that cannot be.
    """
    R = what.rotary_dim // 2
    if what.rotary_dim % 2 or not 0 <= what.rotary_dim <= what.head_dim:
        raise UsageError(f"codegen: rotary_dim is even and at most head_dim {what.head_dim}, not {what.rotary_dim}")
    if what.kv_heads < 1 or what.heads % what.kv_heads:
        raise UsageError(f"codegen: {what.heads} query heads do not share {what.kv_heads} key heads evenly")
    q_blocks, kv_blocks = -(-what.heads // BLOCK_H), -(-what.kv_heads // BLOCK_H)
    slot = "looked up in the block table" if what.by_block_table else "given"
    e = Emitter(
        "rotary_cache_write",
        f"Rotary embedding of {what.heads} query and {what.kv_heads} key heads, cache write of keys and values.",
        (
            f"Grid: (tokens, {q_blocks} blocks of query heads + {kv_blocks} blocks of key heads).",
            f"One program turns {BLOCK_H} heads of one token, {what.rotary_dim} of {what.head_dim} channels, pairs "
            + ("(2i, 2i + 1)," if what.interleaved else f"(i, i + {R}),"),
            f"and writes keys and values to their slot, which is {slot}. In float32, rounded once.",
            *[f"They are int8, by groups of {what.kv_group} channels."] * bool(what.kv_group),
        ),
        {"num_warps": num_warps, "num_stages": 1},
    )
    for name in what.tensors:
        e.pointer(name, what.kind(name))
    strides = ["q_stride", "k_stride", "v_stride", *["table_stride"] * what.by_block_table]
    for name in strides:
        e.integer(name)
    e.constant(H=what.heads, G=what.kv_heads, D=what.head_dim, R=R, PAGE=what.page)
    e.constant(BLOCK_H=BLOCK_H, BLOCK_R=power_of_two(R), BLOCK_D=power_of_two(what.head_dim))
    rest = what.head_dim - what.rotary_dim
    if rest:
        e.constant(BLOCK_REST=power_of_two(rest))
    if checked_group(what.kv_group, what.head_dim):
        group_constants(e, what.kv_group, what.head_dim)
        quantizes(e)
    e.begin(waits=True)
    e.add("token = tl.program_id(0).to(tl.int64)")
    if R or what.by_block_table:
        e.add("position = tl.load(positions + token).to(tl.int64)")
    if R:
        e.add(
            "r = tl.arange(0, BLOCK_R)",
            "cosine = tl.load(cos + position * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]",
            "sine = tl.load(sin + position * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]",
        )
    with e.block(f"if tl.program_id(1) < {q_blocks!r}:"):
        e.add("h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]")
        _turn(e, what, "q + token * q_stride", "turned + token * (H * D)", "H")
    with e.block("else:"):
        e.add(f"h = (tl.program_id(1) - {q_blocks!r}) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]")
        if what.by_block_table:
            e.add("sequence = tl.load(sequences + token).to(tl.int64)")
            with e.block("if sequence < 0:"):
                e.add("return")
            e.add(
                "block = tl.load(block_table + sequence * table_stride + position // PAGE).to(tl.int64)",
                "slot = block * PAGE + position % PAGE",
            )
        else:
            e.add("slot = tl.load(slot_mapping + token).to(tl.int64)")
            with e.block("if slot < 0:"):
                e.add("return")
        if what.kv_group:
            _write_groups(e, what)
        else:
            _turn(e, what, "k + token * k_stride", "k_cache + slot * (G * D)", "G")
            e.add("d = tl.arange(0, BLOCK_D)[None, :]", "whole = (h < G) & (d < D)")
            e.add("value = tl.load(v + token * v_stride + h * D + d, mask=whole)")
            e.add("tl.store(v_cache + slot * (G * D) + h * D + d, value, mask=whole)")
    given = [*what.tensors, "q.stride(0)", "k.stride(0)", "v.stride(0)"]
    given += ["block_table.stride(0)"] * what.by_block_table
    e.host += [
        f"def launch({', '.join(what.tensors)}, pdl=False):",
        '    """Fills turned and the slots of the caches; the rows of q, k and v may be strided."""',
        "    tokens = positions.shape[0]",
        "    if tokens:",
        f"        {e.launched(f'(tokens, {q_blocks + kv_blocks!r})', *given)}",
    ]
    return e.kernel()


def _turn(e: Emitter, what: Rotary, source: str, target: str, heads: str) -> None:
    """Heads `h` of `source`, turned, to `target`; channels that do not turn are copied."""
    if what.rotary_dim:
        e.add(
            f"inside = (h < {heads}) & (r < R)[None, :]",
            "first = h * D + " + ("2 * r[None, :]" if what.interleaved else "r[None, :]"),
            "second = first + " + ("1" if what.interleaved else "R"),
            f"a = tl.load({source} + first, mask=inside).to(tl.float32)",
            f"b = tl.load({source} + second, mask=inside).to(tl.float32)",
            f"tl.store({target} + first, a * cosine - b * sine, mask=inside)",
            f"tl.store({target} + second, b * cosine + a * sine, mask=inside)",
        )
    if what.rotary_dim < what.head_dim:
        e.add(
            "rest = 2 * R + tl.arange(0, BLOCK_REST)[None, :]",
            f"kept_inside = (h < {heads}) & (rest < D)",
            f"kept = tl.load({source} + h * D + rest, mask=kept_inside)",
            f"tl.store({target} + h * D + rest, kept, mask=kept_inside)",
        )


def _write_groups(e: Emitter, what: Rotary) -> None:
    """Keys, turned, and values of heads `h` as int8 by groups: tiles [heads, groups, channels]."""
    e.add(
        "head = h[:, :, None]",
        "group = tl.arange(0, BLOCK_GROUPS)[None, :, None]",
        "w = tl.arange(0, BLOCK_W)[None, None, :]",
        "d = group * W + w",
        "held = (head < G) & (group < GROUPS) & (w < W)",
        "x = tl.load(k + token * k_stride + head * D + d, mask=held, other=0.0).to(tl.float32)",
    )
    if what.rotary_dim:
        if what.interleaved:
            first, other, angle = "d % 2 == 0", "d ^ 1", "d // 2"
        else:
            first, other, angle = "d < R", "tl.where(d < R, d + R, d - R)", "d % R"
        e.add(
            "turns = held & (d < 2 * R)",
            f"other = tl.load(k + token * k_stride + head * D + ({other}), mask=turns, other=0.0).to(tl.float32)",
            f"angle = position * R + {angle}",
            "key_cosine = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)",
            "key_sine = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)",
            f"x = x * key_cosine + tl.where({first}, -other, other) * key_sine",
        )
    _store_groups(e, "k")
    e.add("x = tl.load(v + token * v_stride + head * D + d, mask=held, other=0.0).to(tl.float32)")
    _store_groups(e, "v")


def _store_groups(e: Emitter, side: str) -> None:
    e.add(
        "scale = scale_of(tl.max(magnitude(x), 2, keep_dims=True))",
        f"tl.store({side}_cache + slot * (G * D) + head * D + d, codes_of(x, scale), mask=held)",
        f"place = {side}_scale + slot // PAGE * (G * GROUPS * PAGE) + slot % PAGE",
        "tl.store(place + (head * GROUPS + group) * PAGE, scale, mask=(head < G) & (group < GROUPS))",
    )


def rotary_epilogue(e: Emitter, rotary: Rotary, head_norm_eps: float | None, *, dot: bool, ragged: bool) -> None:
    """What follows a projection's sums a and b, pairs of channels of one head: norm, turn, and where they are stored."""
    row, column = ("[None, :]", "[:, None]") if dot else ("", "")
    e.add("is_query = head < H", "is_key = (head >= H) & (head < H + G)", "is_value = head >= H + G")
    if ragged:
        e.add(*(f"{name} &= n_inside" for name in ("is_query", "is_key", "is_value")))
    if head_norm_eps is not None:
        e.constant(HEAD_EPS=head_norm_eps)
        e.add(
            "# A program holds one head: its root mean square, of queries and keys.",
            "of_head = tl.rsqrt(tl.sum(a * a + b * b, 0) / D + HEAD_EPS)",
            f"of_head = tl.where(is_value{column}, 1.0, of_head{row})",
        )
        for side in "ab":
            channel = f"{side}_row - head * D"
            e.add(
                f"scale = tl.load(q_norm_weight + {channel}, mask=is_query, other=1.0).to(tl.float32)",
                f"scale *= tl.load(k_norm_weight + {channel}, mask=is_key, other=1.0).to(tl.float32)",
                f"{side} *= of_head * scale{column}",
            )
    if not dot:
        e.add("m = tl.arange(0, 1)")
    e.add(f"slot = tl.load(slot_mapping + m{', mask=m_inside, other=-1' if dot else ''}).to(tl.int64)")
    turned_a, turned_b = "a", "b"
    if rotary.rotary_dim:
        turned_a, turned_b = _turned(e, rotary, dot=dot)
    kept = f" & (slot >= 0){row}"
    for target, first, mask, start in (
        ("y", "", f"is_query{column}{' & m_inside[None, :]' if dot else ''}", f"m{row} * (H * D)"),
        ("k_cache", " - H * D", f"is_key{column}{kept}", f"slot{row} * (G * D)"),
        ("v_cache", " - (H + G) * D", f"is_value{column}{kept}", f"slot{row} * (G * D)"),
    ):
        for side, value in (("a", turned_a), ("b", turned_b)):
            channel = f"({side}_row{first}){column}" if first and dot else f"{side}_row{column}{first}"
            e.add(f"tl.store({target} + {start} + {channel}, {value}, mask={mask})")


def _turned(e: Emitter, rotary: Rotary, *, dot: bool) -> tuple[str, str]:
    """The pairs a and b of queries and keys turned by the angle of their token's position."""
    row, column = ("[None, :]", "[:, None]") if dot else ("", "")
    e.add(f"position = tl.load(positions + m{', mask=m_inside, other=0' if dot else ''}).to(tl.int64)")
    pairs = "is_query | is_key" if rotary.rotary_dim == rotary.head_dim else "(is_query | is_key) & (pair < R)"
    e.add(f"turns = ({pairs})[:, None] & m_inside[None, :]" if dot else f"turns = {pairs}")
    e.add(
        f"angle = position{row} * R + pair{column}",
        "cosine = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)",
        "sine = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)",
        "turned_a = a * cosine - b * sine",
        "turned_b = b * cosine + a * sine",
    )
    return "turned_a", "turned_b"
