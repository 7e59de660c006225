"""Attention over a paged cache: decode with the keys in parts, combined in the kernel, and prefill; one main loop for both.

The query heads that share a key head are rows of one tile, so keys and values are read once. Softmax is kept as a running
maximum and sum, in float32 and base 2.
"""

import math
from dataclasses import dataclass

from fuser.codegen.int8_pages import Int8Pages
from fuser.codegen.kernel import Emitter, Kernel, element, power_of_two
from fuser.errors import UsageError

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Attention:
    """What an attention kernel computes: y = softmax(softcap(q k^T scale) + bias) v, causal by position.

    A query at position p sees keys at 0 .. p, with `window` the last `window` of them (itself included). `alibi` adds
    slope[h] (key position - p), after the soft-cap; with `sinks` each head has one more score, sink[h], of no value
    (gpt-oss). Keys and values lie in pages [blocks, page, G, Dh]; with `kv_group` as int8, by groups of so many channels with
    a scale each.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    page: int = 16
    window: int | None = None
    softcap: float = 0.0
    alibi: bool = False
    dtype: str = "bf16"
    sinks: bool = False
    kv_group: int = 0

    @property
    def caches(self) -> list[str]:
        """The tensors that hold keys and values."""
        return ["k_cache", "v_cache", *["k_scale", "v_scale"] * bool(self.kv_group)]

    @property
    def group(self) -> int:
        """The query heads of one key head."""
        return self.heads // self.kv_heads


def decode(
    what: Attention, *, splits: int = 1, BLOCK_T: int | None = None, num_warps: int | None = None,
    num_stages: int | None = None,
) -> Kernel:  # fmt: skip
    """The kernel of `what` for one query a sequence, its keys in `splits` parts.

    launch(q, k_cache, v_cache, [k_scale, v_scale,] block_table, context_lens, [slopes,] [sinks,] y[, partial, arrived]):
    q, y [B, H, Dh], of `dtype`; the caches [blocks, page, G, Dh], with scales [blocks, G, Dh / kv_group, page] float16 where
    they are int8; block_table [B, blocks], context_lens [B] int32: keys of a sequence, its query's own included; slopes,
    sinks [H] float32. A sequence of length 0 gives 0. With parts, the kernel's workspace is what one sequence takes.

    Raises:
        UsageError: heads, widths or dtypes that cannot be.
    """
    BLOCK_M = max(power_of_two(what.group), 16)
    many = BLOCK_M >= 64  # rows, whose sums and scores must fit the registers
    by_add = what.kv_group and what.dtype == "fp32"  # products of two operands in registers
    wide = bool(what.kv_group) and not many and not by_add
    BLOCK_T = BLOCK_T or (32 if wide else 16)
    num_warps = num_warps or (
        8
        if many
        else (8 if what.head_dim > 128 else 4)
        if by_add
        else 2
        if (wide and BLOCK_M > 16) or what.head_dim > 128
        else 1
    )
    return _Composition(what, BLOCK_M, BLOCK_T, splits, num_warps, num_stages or (6 if wide else 8)).kernel()


def default_splits(what: Attention, sequences: int, tokens: int) -> int:
    """Parts of the keys that are good without a search: some 300 programs, each of 64 keys or more.

    `tokens`: about how many keys a sequence has.
    """
    return max(1, min(300 // max(sequences * what.kv_heads, 1), tokens // 64))


def prefill(
    what: Attention, *, BLOCK_M: int | None = None, BLOCK_T: int | None = None, num_warps: int | None = None,
    num_stages: int = 2,
) -> Kernel:  # fmt: skip
    """The kernel of `what` for any number of queries a sequence.

    launch(q, k_cache, v_cache, [k_scale, v_scale,] block_table, context_lens, query_starts, longest, [slopes,] [sinks,] y):
    q, y [tokens, H, Dh], the tokens of sequence b at query_starts[b] .. query_starts[b + 1] (int32 [B + 1]), the last ones of
    its context_lens[b] keys; `longest`: at least the most tokens of a sequence.

    Raises:
        UsageError: heads, widths or dtypes that cannot be.
    """
    wide = what.head_dim > 128 or what.dtype == "fp32"  # sums and scores must fit the registers
    if what.kv_group and (wide or what.head_dim > 64):  # codes take registers as well
        BLOCK_M = BLOCK_M or (32 if wide else 128)
        BLOCK_T, num_warps = BLOCK_T or 16, num_warps or (8 if what.head_dim > 64 else 4)
    BLOCK_M = BLOCK_M or (64 if wide or what.head_dim <= 64 else 128)
    BLOCK_T = BLOCK_T or (32 if wide or what.kv_group or what.head_dim <= 32 else 64)
    warps = num_warps or (4 if what.head_dim <= 64 or (wide and what.head_dim <= 128) else 8)
    return _Composition(what, BLOCK_M, BLOCK_T, None, warps, num_stages).kernel()


class _Composition:
    """One kernel being composed; each method adds one part of its body. `splits` is None for prefill."""

    def __init__(
        self, what: Attention, BLOCK_M: int, BLOCK_T: int, splits: int | None, num_warps: int, num_stages: int
    ) -> None:
        if what.kv_heads < 1 or what.heads % what.kv_heads:
            raise UsageError(f"codegen: {what.heads} query heads do not share {what.kv_heads} key heads evenly")
        if not 0 < what.head_dim <= 256:
            raise UsageError(f"codegen: attention takes head widths of 1 to 256, not {what.head_dim}")
        if splits is not None and splits < 1:
            raise UsageError(f"codegen: the keys are taken in 1 or more parts, not {splits}")
        if not what.scale > 0.0:
            raise UsageError(f"codegen: scores are scaled by a positive number, not {what.scale}")
        if what.window is not None and what.window < 1:
            raise UsageError(f"codegen: a window holds 1 or more keys, not {what.window}")
        self.what, self.splits = what, splits
        self.parts = splits is not None and splits > 1
        self.padded = power_of_two(what.head_dim) != what.head_dim
        self.whole_pages = what.page % BLOCK_T == 0  # a step then lies in one page
        name = "paged_prefill" if splits is None else "paged_decode"
        extras = [f"window {what.window}"] if what.window else []
        extras += [f"softcap {what.softcap!r}"] * bool(what.softcap) + ["ALiBi"] * what.alibi + ["sinks"] * what.sinks
        summary = f"Paged attention, {'prefill' if splits is None else 'decode'}: {what.heads} query heads, "
        summary += f"{what.kv_heads} key heads of {what.head_dim}{', ' if extras else ''}{', '.join(extras)}."
        if splits is None:
            grid = "Grid: (tiles of queries x heads of a group, key heads, sequences)."
            work = f"One program computes {BLOCK_M} rows, each a query and a head, from keys up to the last query's."
        else:
            grid = f"Grid: (sequences x key heads, {splits} parts of the keys)."
            work = f"One program takes {what.group} query heads of one sequence through one part of its keys."
            if self.parts:
                work += "\nThe last part to arrive combines them all, in their order, so results repeat bit by bit."
        e = Emitter(
            name,
            summary,
            (
                grid,
                *work.splitlines(),
                f"{BLOCK_T} keys a step, pages of {what.page}. Products by tensor cores, in float32.",
            ),
            {"num_warps": num_warps, "num_stages": num_stages},
        )
        self.emitter = e
        e.pointer("q", element(what.dtype))
        for tensor in what.caches:
            kind = "fp16" if tensor.endswith("scale") else "i16" if what.kv_group else what.dtype
            e.pointer(tensor, kind)
        self.tensors = ["q", *what.caches, "block_table", "context_lens"]
        self.tensors += ["query_starts"] * (splits is None) + ["slopes"] * what.alibi + ["sinks"] * what.sinks + ["y"]
        e.pointer("block_table", "i32")
        e.pointer("context_lens", "i32")
        if splits is None:
            e.pointer("query_starts", "i32")
        if what.alibi:
            e.pointer("slopes", "fp32")
        if what.sinks:
            e.pointer("sinks", "fp32")
        e.pointer("y", what.dtype)
        if self.parts:
            e.pointer("partial", "fp32")
            e.pointer("arrived", "i32")
        e.integer("table_stride")
        e.constant(H=what.heads, G=what.kv_heads, GROUP=what.group, D=what.head_dim, PAGE=what.page)
        e.constant(BLOCK_M=BLOCK_M, BLOCK_T=BLOCK_T, BLOCK_D=max(power_of_two(what.head_dim), 16))
        self.padded |= what.head_dim < 16
        # Softmax in base 2. A soft-cap needs the scores as they are, so the change of base comes after it.
        e.constant(SCALE=what.scale if what.softcap else what.scale * LOG2_E)
        if what.softcap:
            e.constant(SOFTCAP=what.softcap)
        if what.window:
            e.constant(WINDOW=what.window)
        e.constant(WIDE=False)
        self.pages = Int8Pages(e, what.head_dim, what.kv_group, what.dtype) if what.kv_group else None
        if self.parts:
            assert splits is not None
            BLOCK_D, BLOCK_R = max(power_of_two(what.head_dim), 16), power_of_two(what.group)
            chunk = max(min(4096 // (BLOCK_R * BLOCK_D), power_of_two(splits)), 1)  # parts that registers can hold
            scratch = -(-splits * what.group * (BLOCK_D + 2) // 32) * 32
            e.constant(SPLITS=splits, BLOCK_P=power_of_two(splits), BLOCK_R=BLOCK_R, CHUNK=chunk, SCRATCH=scratch)

    def kernel(self) -> Kernel:
        """The whole of it."""
        self.emitter.begin(waits=True)
        if self.splits is None:
            self._prefill_rows()
        else:
            self._decode_rows()
        self._main_loop()
        if self.pages is not None:
            self.pages.end()
        if self.parts:
            self._combine()
        else:
            self.emitter.add("# A row that sees no key gives 0.")
            for end, channels in self._tiles:
                self.emitter.add(f"result = acc{end} / tl.where(total > 0.0, total, 1.0)[:, None]")
                self.emitter.add(f"tl.store(y + rows[:, None] + {channels}[None, :], result, mask=inside)")
        self._host()
        return self.emitter.kernel()

    @property
    def _tiles(self) -> list[tuple[str, str]]:
        """The end of the names of each tile of sums, and its channels."""
        return [("", "d")] if self.pages is None else self.pages.tiles

    def _decode_rows(self) -> None:
        e = self.emitter
        e.add(
            "sequence = tl.program_id(0) // G",
            "g = tl.program_id(0) % G",
            "# Rows: the query heads of one key head.",
            "m = tl.arange(0, BLOCK_M)",
            *["d = tl.arange(0, BLOCK_D)"] * (self.pages is None or self.parts),
            "head = g * GROUP + m",
            "row_inside = m < GROUP",
            "context = tl.load(context_lens + sequence)",
            "rows = (sequence.to(tl.int64) * H + head) * D",
            "first = 0" if not self.what.window else "first = tl.maximum(context - WINDOW, 0)",
            "last = context",
        )
        if self.parts:
            e.add(
                "# This part's keys, whole steps of them.",
                "start = first // BLOCK_T * BLOCK_T",
                "length = tl.cdiv(tl.cdiv(context - start, BLOCK_T), SPLITS) * BLOCK_T",
                "start += tl.program_id(1) * length",
                "last = tl.minimum(start + length, context)",
            )
        else:
            e.add("start = first // BLOCK_T * BLOCK_T")

    def _prefill_rows(self) -> None:
        e = self.emitter
        e.add(
            "sequence = tl.program_id(2)",
            "g = tl.program_id(1)",
            "tile = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last ones see the most keys: they begin",
            "query_start = tl.load(query_starts + sequence)",
            "queries = tl.load(query_starts + sequence + 1) - query_start",
        )
        with e.block("if tile >= queries * GROUP:"):
            e.add("return")
        e.add(
            "# Rows: queries, and within one the query heads of one key head.",
            "m = tile + tl.arange(0, BLOCK_M)",
            *["d = tl.arange(0, BLOCK_D)"] * (self.pages is None),
            "query = m // GROUP",
            "head = g * GROUP + m % GROUP",
            "row_inside = query < queries",
            "context = tl.load(context_lens + sequence)",
            "position = context - queries + query",
            "rows = ((query_start + query).to(tl.int64) * H + head) * D",
            "last_query = tl.minimum((tile + BLOCK_M - 1) // GROUP, queries - 1)",
            "last = context - queries + last_query + 1",
        )
        if self.what.window:
            e.add(
                "first = tl.maximum(context - queries + tile // GROUP + 1 - WINDOW, 0)",
                "start = first // BLOCK_T * BLOCK_T",
            )
        else:
            e.add(
                "start = 0",
                "whole = (context - queries + tile // GROUP + 1) // BLOCK_T * BLOCK_T  # keys that every row sees",
            )

    def _main_loop(self) -> None:
        e, what = self.emitter, self.what
        if self.pages is not None:
            self.pages.begin()
        else:
            e.add("inside = row_inside[:, None]" + (" & (d < D)[None, :]" if self.padded else ""))
            e.add("queries_tile = tl.load(q + rows[:, None] + d[None, :], mask=inside, other=0.0)")
        if what.alibi:
            e.add(f"slope = tl.load(slopes + head, mask=row_inside, other=0.0) * {LOG2_E!r}")
        if what.sinks:
            e.add(
                "# A sink is a score of its own, seen first.",
                f"highest = tl.load(sinks + head, mask=row_inside, other=0.0) * {LOG2_E!r}",
                "total = tl.full([BLOCK_M], 1.0, tl.float32)",
            )
            if self.parts:
                with e.block("if tl.program_id(1) > 0:"):
                    e.add('highest = tl.full([BLOCK_M], float("-inf"), tl.float32)', "total = total * 0.0")
        else:
            e.add(
                'highest = tl.full([BLOCK_M], float("-inf"), tl.float32)',
                "total = tl.zeros([BLOCK_M], tl.float32)",
            )
        if self.pages is None:
            e.add("acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)")
        e.add("table = block_table + sequence.to(tl.int64) * table_stride")
        if self.pages is not None:
            self.pages.first_scales(self._page_of("start", 0), self._page_of("start", 1))
        if what.window:
            self._steps("start", "last", masked=True)
            return
        if self.splits is not None:
            e.add("whole = start + tl.maximum(last - start, 0) // BLOCK_T * BLOCK_T")
        self._steps("start", "whole", masked=False)
        self._steps("whole", "last", masked=True)

    def _page_of(self, step: str, ahead: int) -> str:
        """The pages of keys so many steps after those of `t`, which begin at `step`; page 0 past the last key."""
        key = (step if self.whole_pages else "t") + ("", " + BLOCK_T", " + 2 * BLOCK_T")[ahead]
        return f"tl.load(table + {f'({key})' if ahead else key} // PAGE, mask={key} < last, other=0)"

    def _steps(self, start: str, stop: str, *, masked: bool) -> None:
        """A loop over keys; where every row sees every key of a step, nothing is masked."""
        e, what = self.emitter, self.what
        exact = ', input_precision="ieee"' if what.dtype == "fp32" else ""
        inside = ["t_inside[:, None]"] * masked + ["(d < D)[None, :]"] * self.padded
        mask = f", mask={' & '.join(inside)}, other=0.0" if inside else ""
        is_scaled = bool(what.softcap) or what.alibi  # scores as they are; otherwise the scale joins the exponent
        with e.block(f"for step in range({start}, {stop}, BLOCK_T):"):
            e.add("t = step + tl.arange(0, BLOCK_T)")
            if masked:
                e.add("t_inside = t < last")
            if self.whole_pages:
                look_up, offset = "table + step // PAGE", "step % PAGE + tl.arange(0, BLOCK_T)"
            else:
                look_up, offset = "table + t // PAGE" + (", mask=t_inside, other=0" if masked else ""), "t % PAGE"
            e.add(f"block = tl.load({look_up})")
            scale, row_scale = "SCALE", "SCALE"
            if self.pages is not None:
                self.pages.load(offset, masked=masked)
                self.pages.next_scales(self._page_of("step", 2), masked=masked)
                self.pages.scores()
                scale, row_scale = self.pages.scales
                e.add(*[f"scores *= {scale}"] * is_scaled)
            else:
                e.add(
                    f"slot = (block.to(tl.int64) if WIDE else block) * PAGE + {offset}",
                    "place = (slot * G + g)[:, None] * D + d[None, :]",
                    f"keys = tl.load(k_cache + place{mask})",
                    f"values = tl.load(v_cache + place{mask})",
                    f"scores = tl.dot(queries_tile, tl.trans(keys){exact}){' * SCALE' if is_scaled else ''}",
                )
            if what.softcap:
                e.add(
                    "# tanh z = 1 - 2 / (exp(2 z) + 1)",
                    "scores = SOFTCAP - 2.0 * SOFTCAP / (tl.exp(scores * (2.0 / SOFTCAP)) + 1.0)",
                    f"scores *= {LOG2_E!r}",
                )
            position = "(context - 1)" if self.splits is not None else "position[:, None]"
            if what.alibi:
                e.add(f"scores += slope[:, None] * (t[None, :] - {position}).to(tl.float32)")
            if masked:
                seen = ["t_inside[None, :]"] if self.splits is not None else [f"(t[None, :] <= {position})"]
                seen += [f"(t[None, :] > {position} - WINDOW)"] * bool(what.window)
                e.add(f'scores = tl.where({" & ".join(seen)}, scores, float("-inf"))')
            scale, row_scale = ("", "") if is_scaled else (f" * {scale}", f" * {row_scale}")
            e.add(f"above = tl.maximum(highest, tl.max(scores, 1){row_scale})")
            if masked:
                e.add('safe = tl.where(above > float("-inf"), above, 0.0)  # of a row that has seen no key')
            safe = "safe" if masked else "above"
            e.add(
                f"weights = tl.exp2(scores{scale} - {safe}[:, None])",
                f"decay = tl.exp2(highest - {safe})",
                "total = total * decay + tl.sum(weights, 1)",
            )
            if self.pages is not None:
                self.pages.accumulate()
            else:
                e.add(f"acc = tl.dot(weights.to(v_cache.dtype.element_ty), values, acc * decay[:, None]{exact})")
            e.add("highest = above")

    def _combine(self) -> None:
        """Sums [parts, rows, Dh] of every part, then their maxima and totals [parts, rows] each."""
        e = self.emitter
        e.add(
            "# Every part leaves its sums; the last to arrive combines them in order.",
            "sums = partial + tl.program_id(0).to(tl.int64) * SCRATCH",
            "maxima = sums + SPLITS * GROUP * BLOCK_D",
            "totals = maxima + SPLITS * GROUP",
            "own = tl.program_id(1) * GROUP + m",
        )
        stored = "row_inside[:, None]" if self.pages is None else "inside"
        for end, channels in self._tiles:
            e.add(f"tl.store(sums + own[:, None] * BLOCK_D + {channels}[None, :], acc{end}, mask={stored})")
        e.add(
            "tl.store(maxima + own, highest, mask=row_inside)",
            "tl.store(totals + own, total, mask=row_inside)",
            "tl.debug_barrier()  # the counter follows what all threads stored",
            'before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel")',
        )
        with e.block("if before != SPLITS - 1:"):
            e.add("return")
        e.add(
            "tl.debug_barrier()",
            "tl.store(arrived + tl.program_id(0), 0)  # ready for the next launch",
            "r = tl.arange(0, BLOCK_R)",
            "p = tl.arange(0, BLOCK_P)",
            "every = p[:, None] * GROUP + r[None, :]",
            "part_inside = (p < SPLITS)[:, None] & (r < GROUP)[None, :]",
            'tops = tl.load(maxima + every, mask=part_inside, other=float("-inf"), cache_modifier=".cg")',
            'counts = tl.load(totals + every, mask=part_inside, other=0.0, cache_modifier=".cg")',
            "highest = tl.max(tops, 0)",
            'highest = tl.where(highest > float("-inf"), highest, 0.0)  # of a row that has seen no key',
            "total = tl.sum(counts * tl.exp2(tops - highest[None, :]), 0)",
            "result = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)",
        )
        with e.block("for first_part in range(0, SPLITS, CHUNK):"):
            e.add(
                "c = first_part + tl.arange(0, CHUNK)",
                "some = c[:, None] * GROUP + r[None, :]",
                "some_inside = (c < SPLITS)[:, None] & (r < GROUP)[None, :]",
                'top = tl.load(maxima + some, mask=some_inside, other=float("-inf"), cache_modifier=".cg")',
                "place = sums + some[:, :, None] * BLOCK_D + d[None, None, :]",
                'parts = tl.load(place, mask=some_inside[:, :, None], other=0.0, cache_modifier=".cg")',
                "result += tl.sum(parts * tl.exp2(top - highest[None, :])[:, :, None], 0)",
            )
        inside = "(r < GROUP)[:, None]" + (" & (d < D)[None, :]" if self.padded else "")
        e.add(
            "# A row that sees no key gives 0.",
            "result = result / tl.where(total > 0.0, total, 1.0)[:, None]",
            "rows = (sequence.to(tl.int64) * H + g * GROUP + r) * D",
            f"tl.store(y + rows[:, None] + d[None, :], result, mask={inside})",
        )

    def _host(self) -> None:
        e, what = self.emitter, self.what
        parameters = list(self.tensors)
        arguments = list(self.tensors)
        if self.splits is None:
            parameters.insert(parameters.index("query_starts") + 1, "longest")
        if self.parts:
            parameters += ["partial", "arrived"]
            arguments += ["partial", "arrived"]
            e.workspace = (what.kv_heads * int(str(e.constants["SCRATCH"])), what.kv_heads)
        if what.kv_group:
            arguments[1:3] = [f"{name}.view(torch.int16)" for name in what.caches[:2]]
        arguments += ["block_table.stride(0)", "WIDE=k_cache.numel() >= 2**31"]
        arguments += ["PACKED=not triton.knobs.runtime.interpret"] * bool(what.kv_group)
        if self.splits is None:
            rows = f"triton.cdiv(longest * {what.group!r}, {e.constants['BLOCK_M']!r})"
            runs, grid = "sequences and longest", f"({rows}, {what.kv_heads!r}, sequences)"
        else:
            runs, grid = "sequences", f"(sequences * {what.kv_heads!r}, {self.splits!r})"
        e.host += [
            f"def launch({', '.join(parameters)}, pdl=False):",
            '    """Fills y; all tensors are contiguous."""',
            "    sequences = context_lens.shape[0]",
            f"    if {runs}:",
            f"        {e.launched(grid, *arguments)}",
        ]
