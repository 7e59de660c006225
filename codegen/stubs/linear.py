"""Tests of products, with what is in their launch, and of rotary embedding with its cache write."""

from collections.abc import Iterator

from fuser.codegen.kernel import Kernel
from fuser.codegen.linear import Linear
from fuser.codegen.matmul import Matmul
from fuser.codegen.rotary import Rotary
from fuser.codegen.stubs.parts import ACTIVATIONS, INTEGERS, Parts, listed

SLOTS = """
    slots = integers(range(tokens)) + 2
    slots[1:2] = -1  # the second token has no place
"""

BY_ROW = '''
def product(x, weight):
    """x W^T, some rows of W at once: few are held in float64."""
    return torch.cat([x @ rows.double().T for rows in weight.split(4096)], -1)
'''

BY_COLUMN = '''
def product(x, weight):
    """x W, some columns of W at once: few are held in float64."""
    return torch.cat([x @ columns.double() for columns in weight.split(4096, 1)], -1)
'''

TURNED = '''
def turned(x, cos, sin, positions):
    """Rotary embedding of x [tokens, heads, D]: pairs {which} of the first {channels} channels turn."""
    c, s = (table.double()[positions.long()][:, None] for table in (cos, sin))
    a, b = {pairs}
    turns = [a * c - b * s, b * c + a * s]
    return torch.cat([{joined}, x[..., 2 * R :]], -1)
'''

FILLED = '''
def filled(cache, rows, slots):
    """The cache after the rows of tokens whose slot is not negative have been written; NaN elsewhere."""
    whole = torch.full_like(cache, float("nan"), dtype=torch.float64)
    whole.flatten(0, 1)[slots[slots >= 0].long()] = rows[slots >= 0]
    return whole
'''


def linear(what: Linear | Matmul, kernel: Kernel) -> Parts:
    """y = norm(x) W^T + bias, activation, gate, residual; or the projection with rotary embedding and cache write."""
    rotary = what.rotary if isinstance(what, Linear) else None
    tokens = sorted({1, what.tokens}) if isinstance(what, Linear) else [1, 37, 200]
    constants = [f"N, K = {what.N!r}, {what.K!r}"]
    functions = [BY_COLUMN if what.by_input else BY_ROW]
    if rotary is not None:
        constants += _sizes(rotary)
        functions += [INTEGERS, *_turned(rotary), FILLED]
    named = {name: value for name, value in _tensors(what).items() if name in what.tensors}
    read = [name for name in what.tensors if name not in ("y", "column_sums")]
    body = "\n".join(f"    {line}" for line in _definition(what))
    weight = f"    weight = drawn({'K, N' if what.by_input else 'N, K'}, scale=K**-0.5)"
    before = [weight, *[SLOTS.strip("\n")] * (rotary is not None)]
    functions.append("\n".join(["def inputs(tokens):", *before, listed({n: named[n] for n in what.tensors})]))
    functions.append(f"def definition({', '.join(read)}, **_):\n{body}")
    return Parts(_tuple(tokens), joined(functions), tuple(constants))


def joined(functions: list[str]) -> str:
    """Functions with the blank lines between them."""
    return "\n\n\n".join(function.strip("\n") for function in functions)


def _tuple(values: list[int]) -> str:
    return f"({', '.join(map(repr, values))}{',' * (len(values) == 1)})"


def _tensors(what: Linear | Matmul) -> dict[str, str]:
    width = f"tokens, {what.width!r}"
    axis = 0 if what.by_input else 1
    return {
        "x": "drawn(tokens, K, scale=3.0) + 1.0",
        "weight": "weight",
        "column_sums": f"weight.float().sum({axis})",
        "bias": "drawn(N)",
        "residual": f"drawn({width})",
        "q_norm_weight": "drawn(D)",
        "k_norm_weight": "drawn(D)",
        **_step(),
        "y": f"unwritten({width})",
    }


def _step() -> dict[str, str]:
    """What a step says of its tokens, and the caches."""
    return {
        "cos": "torch.rand(tokens + 3, R, device=DEVICE)",
        "sin": "torch.rand(tokens + 3, R, device=DEVICE)",
        "positions": "integers(range(tokens)) + 3",
        "slot_mapping": "slots",
        "k_cache": "unwritten(tokens // PAGE + 3, PAGE, G, D)",
        "v_cache": "unwritten(tokens // PAGE + 3, PAGE, G, D)",
    }


def _sizes(rotary: Rotary) -> list[str]:
    sizes = (rotary.heads, rotary.kv_heads, rotary.head_dim, rotary.rotary_dim // 2, rotary.page)
    return [f"H, G, D, R, PAGE = {', '.join(map(repr, sizes))}"]


def _turned(rotary: Rotary) -> list[str]:
    if not rotary.rotary_dim:
        return []
    if rotary.interleaved:
        which, pairs = "(2i, 2i + 1)", "x[..., : 2 * R].unflatten(-1, (R, 2)).unbind(-1)"
        ends = "torch.stack(turns, -1).flatten(-2)"
    else:
        which, pairs, ends = "(i, i + R)", "x[..., : 2 * R].chunk(2, -1)", "*turns"
    return [TURNED.format(which=which, channels=rotary.rotary_dim, pairs=pairs, joined=ends)]


def normed(kind: str, eps: float, x: str) -> Iterator[str]:
    """x normed along its last axis, without scale and shift, in place."""
    if kind == "layer":
        yield f"{x} = {x} - {x}.mean(-1, keepdim=True)"
    yield f"{x} = {x} * ({x}.square().mean(-1, keepdim=True) + {eps!r}).rsqrt()"


def _definition(what: Linear | Matmul) -> Iterator[str]:
    yield "x = x.double()"
    if isinstance(what, Linear) and what.norm:
        yield from normed(what.norm, what.norm_eps, "x")
    yield "y = product(x, weight)" + (" + bias.double()" if what.bias else "")
    if isinstance(what, Linear) and what.rotary is not None:
        yield from _heads(what, what.rotary)
        return
    is_gated = what.pairs if isinstance(what, Linear) else what.gated
    if is_gated:
        yield "gate, up = y.chunk(2, -1)"
    if what.activation:
        yield f"y = {ACTIVATIONS[what.activation].format('gate' if is_gated else 'y')}{' * up' * is_gated}"
    yield f'return {{"y": y{" + residual.double()" * what.residual}}}'


def _heads(what: Linear, rotary: Rotary) -> Iterator[str]:
    yield "q, k, v = y.unflatten(-1, (-1, D)).split([H, G, G], 1)"
    for side in "qk":
        if what.head_norm_eps is not None:
            yield from normed("rms", what.head_norm_eps, side)
            yield f"{side} = {side} * {side}_norm_weight.double()"
    if rotary.rotary_dim:
        yield "q, k = (turned(heads, cos, sin, positions) for heads in (q, k))"
    yield from (
        "return {",
        '    "y": q.flatten(1),',
        '    "k_cache": filled(k_cache, k, slot_mapping),',
        '    "v_cache": filled(v_cache, v, slot_mapping),',
        "}",
    )


def rotary(what: Rotary, kernel: Kernel) -> Parts:
    """Rotary embedding and the write to slots, given or looked up in a block table."""
    shapes = _step() | {
        "q": "q",
        "k": "k",
        "v": "v",
        "sequences": "torch.where(slots < 0, -1, 0).int()",
        "block_table": "torch.arange(tokens // PAGE + 3, device=DEVICE).flip(0).int()[None]",
        "turned": "unwritten(tokens, H, D)",
    }
    made = listed({name: shapes[name] for name in what.tensors})
    packed = "    q, k, v = drawn(tokens, (H + 2 * G) * D).split([H * D, G * D, G * D], 1)  # rows are strided"
    body = ["q, k, v = (x.double().unflatten(-1, (-1, D)) for x in (q, k, v))"]
    if what.rotary_dim:
        body.append("q, k = (turned(heads, cos, sin, positions) for heads in (q, k))")
    slots = "slot_mapping"
    if what.by_block_table:
        body += ["p = positions.long()", "slots = block_table[sequences.long(), p // PAGE] * PAGE + p % PAGE"]
        body.append("slots = torch.where(sequences < 0, -1, slots)")
        slots = "slots"
    body += [f'return {{"turned": q, "k_cache": filled(k_cache, k, {slots}), "v_cache": filled(v_cache, v, {slots})}}']
    read = [name for name in what.tensors if name != "turned"]
    functions = [INTEGERS, *_turned(what), FILLED, f"def inputs(tokens):\n{packed}{SLOTS}{made}"]
    functions.append("\n".join([f"def definition({', '.join(read)}, **_):", *(f"    {line}" for line in body)]))
    return Parts("(1, 5)", joined(functions), tuple(_sizes(what)))
