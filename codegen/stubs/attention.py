"""Tests of attention over pages: decode with its keys in parts, and prefill."""

from fuser.codegen.attention import Attention
from fuser.codegen.kernel import Kernel
from fuser.codegen.stubs.linear import joined
from fuser.codegen.stubs.parts import INTEGERS, Parts, listed

PAGED = '''
def paged(lengths):
    """Keys, values and the block table of sequences in shuffled pages."""
    counts = [-(-length // PAGE) for length in lengths]
    k_cache, v_cache = (drawn(sum(counts) + 1, PAGE, G, D) for _ in "kv")
    order = torch.randperm(sum(counts)).tolist()
    rows = [[order.pop() for _ in range(count)] for count in counts]
    return k_cache, v_cache, integers([row + [0] * (max(counts) - len(row)) for row in rows])
'''

SEQUENCES = '''
def sequences(k_cache, v_cache, block_table, context_lens):
    """The keys and values [T, G, D] of every sequence."""
    for row, length in zip(block_table.long(), context_lens.tolist(), strict=True):
        yield [cache[row].flatten(0, 1)[:length].double() for cache in (k_cache, v_cache)]
'''


def attention(what: Attention, kernel: Kernel) -> Parts:
    """Lengths around a page, a step and a window; of prefill, whole prompts and chunks."""
    has_queries = "query_starts" in kernel.signature
    more = ["slopes"] * what.alibi + ["sinks"] * what.sinks
    sizes = (what.heads, what.kv_heads, what.head_dim, what.page)
    constants = [f"H, G, D, PAGE = {', '.join(map(repr, sizes))}", f"SCALE = {what.scale!r}"]
    constants += [f"SOFTCAP = {what.softcap!r}"] * bool(what.softcap)
    constants += [f"WINDOW = {what.window!r}"] * bool(what.window)
    if has_queries:
        cases = ["(13, 13)", "(19, 49)", "(0, 5)", "(1, 24)", *[f"(3, {what.window} + 7)"] * bool(what.window)]
    else:
        cases = ["1", "0", "16", "77", *[f"{what.window} + 7"] * bool(what.window)]
    inputs = _prefill_inputs(more) if has_queries else _decode_inputs(more)
    functions = joined([INTEGERS, PAGED, SEQUENCES, inputs, _attended(what, more), _definition(more, has_queries)])
    return Parts(f"[({', '.join(cases)})]", functions, tuple(constants), 1 if has_queries else len(cases))


def _given(more: list[str]) -> dict[str, str]:
    drawn = {
        "slopes": "torch.rand(H, device=DEVICE)",
        "sinks": "torch.randn(H, device=DEVICE)",
    }
    return {name: drawn[name] for name in more}


def _decode_inputs(more: list[str]) -> str:
    made = {
        "q": "drawn(len(lengths), H, D, scale=2.0)",
        "k_cache": "k_cache",
        "v_cache": "v_cache",
        "block_table": "block_table",
        "context_lens": "integers(lengths)",
        **_given(more),
        "y": "unwritten(len(lengths), H, D)",
    }
    return f"def inputs(lengths):\n    k_cache, v_cache, block_table = paged(lengths)\n{listed(made)}"


def _prefill_inputs(more: list[str]) -> str:
    made = {
        "q": "drawn(sum(queries), H, D, scale=2.0)",
        "k_cache": "k_cache",
        "v_cache": "v_cache",
        "block_table": "block_table",
        "context_lens": "integers(lengths)",
        "query_starts": "integers([sum(queries[:i]) for i in range(len(queries) + 1)])",
        "longest": "max(queries)",
        **_given(more),
        "y": "unwritten(sum(queries), H, D)",
    }
    before = "    queries, lengths = zip(*case, strict=True)\n    k_cache, v_cache, block_table = paged(lengths)"
    return f"def inputs(case):\n{before}\n{listed(made)}"


def _attended(what: Attention, more: list[str]) -> str:
    lines = [
        f"def attended({', '.join(['q', 'keys', 'values', *more])}):",
        '    """One sequence: q [S, H, D], the queries of its last tokens."""',
        "    S, T = len(q), len(keys)",
        "    keys, values = (x.repeat_interleave(H // G, 1) for x in (keys, values))",
        '    scores = torch.einsum("shd,thd->hst", q, keys) * SCALE',
        "    distance = torch.arange(T, device=DEVICE) - torch.arange(T - S, T, device=DEVICE)[:, None]",
    ]
    if what.softcap:
        lines.append("    scores = SOFTCAP * (scores / SOFTCAP).tanh()")
    if what.alibi:
        lines.append("    scores = scores + slopes.double()[:, None, None] * distance")
    unseen = "(distance > 0) | (distance <= -WINDOW)" if what.window else "distance > 0"
    lines.append(f'    scores = scores.masked_fill({unseen}, float("-inf"))')
    if what.sinks:
        lines.append("    scores = torch.cat([scores, sinks.double()[:, None, None].expand(H, S, 1)], -1)")
    lines.append(f'    return torch.einsum("hst,thd->shd", scores.softmax(-1){"[..., :T]" * what.sinks}, values)')
    return "\n".join(lines)


def _definition(more: list[str], has_queries: bool) -> str:
    read = ["q", "k_cache", "v_cache", "block_table", "context_lens", *["query_starts"] * has_queries, *more]
    queries = "q.split(query_starts.diff().tolist())" if has_queries else "q.split(1)"
    extra = "".join(f", {name}" for name in more)
    return f"""
def definition({", ".join(read)}, **_):
    queries = {queries}
    cached = sequences(k_cache, v_cache, block_table, context_lens)
    y = [attended(rows.double(), *pair{extra}) for rows, pair in zip(queries, cached, strict=True)]
    return {{"y": torch.cat(y)}}
""".strip("\n")
