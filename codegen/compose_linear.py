"""What a product takes into its kernel: the norm before it, and bias, activation, gate, residual, cache write after it."""

from dataclasses import dataclass, field, replace

from fuser.codegen.arrangement import Tokens, arrangement, keeps_rows
from fuser.codegen.kernel import ACTIVATIONS, power_of_two
from fuser.codegen.plan import NORMS, Launch
from fuser.constants import Constant, Joined, Transposed
from fuser.formats import KNOWN, Format
from fuser.graph import FUSER, Node, Value
from fuser.quantized import Quantized


@dataclass(eq=False)
class Product:
    """A launch whose main part is a product with a weight, as far as a linear kernel computes it."""

    main: Node
    weight: Constant  # [K, N]
    result: Value  # what the kernel's y is
    norm: Node | None = None
    bias: Constant | None = None
    activation: str | None = None
    gated: bool = False
    residual: Value | None = None
    write: Node | None = None  # rotary_cache_write or cache_write
    head_norms: tuple[Node, Node] | None = None  # of queries and of keys
    nodes: list[Node] = field(default_factory=list)  # what the kernel computes
    left: list[Node] = field(default_factory=list)  # what has to follow as launches of their own


def product_of(launch: Launch, tokens: Tokens, *, few: bool, writes: bool, gates: bool = False) -> Product:
    """Reads a launch of the family `linear`; of many tokens, with bias and residual alone, or with `gates` as well.

    `writes`: whether kernels of few tokens write to the cache.
    """
    main = next(node for role, node in launch.parts if role == "main")
    weight = main.inputs[1]
    assert weight is not None
    made = Product(main, _constant(weight), main.output)
    made.norm = next((node for role, node in launch.parts if role == "prologue"), None)
    bias = main.input(2)
    if bias is not None and bias.constant is not None:
        made.bias = bias.constant
    own = set(launch.nodes)
    taken = {main, *([made.norm] if made.norm is not None else [])}
    absorbed = few and writes and _takes_write(made, own, taken, tokens)
    absorbed = absorbed or ((few or gates) and _takes_gate(made, own, taken))
    if not absorbed and len(main.outputs) == 1:
        _takes_steps(made, own, taken, tokens, few=few or gates)
    made.nodes = [node for node in launch.nodes if node in taken]
    made.left = [node for node in launch.nodes if node not in taken]
    return made


def _constant(weight: Value) -> Constant:
    if weight.constant is not None:
        return weight.constant
    assert weight.producer is not None and weight.producer.inputs[0] is not None
    stored = weight.producer.inputs[0].constant  # transposed: tied to an embedding
    assert stored is not None
    return Transposed(stored)


def _sole(value: Value, own: set[Node]) -> Node | None:
    """The one node that reads a value, if it is of the launch and nothing else needs the value."""
    readers = value.consumers
    return readers[0] if len(readers) == 1 and readers[0] in own and not value.is_output else None


def _takes_steps(made: Product, own: set[Node], taken: set[Node], tokens: Tokens, *, few: bool) -> None:
    """Bias, activation and residual, one after another, as long as nothing else reads what lies between."""
    while True:
        node = _sole(made.result, own)
        if node is None:
            return
        if (
            few
            and node.op in ACTIVATIONS
            and node.domain == FUSER
            and made.activation is None
            and made.residual is None
        ):
            made.activation = node.op
        elif node.is_a("Add") and (vector := _bias(node, made)) is not None:
            made.bias = vector
        elif node.is_a("Add") and made.residual is None and (other := _other(node, made.result, tokens)) is not None:
            made.residual = other
        elif not keeps_rows(node, tokens):
            return
        taken.add(node)
        made.result = node.output


def _bias(node: Node, made: Product) -> Constant | None:
    """A vector over the columns that is added to a product, the first one, and before an activation."""
    if made.bias is not None or made.activation is not None:
        return None
    other = next((value for value in node.inputs if value is not made.result), None)
    if other is None or other.constant is None or other.shape is None:
        return None
    shape = other.constant.shape
    return other.constant if shape and shape[-1] == made.weight.shape[1] == other.constant.size else None


def _other(node: Node, result: Value, tokens: Tokens) -> Value | None:
    """What is added to a result, if it has rows of the same width."""
    other = next((value for value in node.inputs if value is not result), None)
    own, theirs = arrangement(result, tokens), arrangement(other, tokens)
    return other if own is not None and theirs is not None and own.row == theirs.row else None


def _takes_gate(made: Product, own: set[Node], taken: set[Node]) -> bool:
    """Gate and up side by side, and nothing but the gate reads them."""
    outputs = made.main.outputs
    readers = {_sole(output, own) for output in outputs}
    node = next(iter(readers))
    if len(outputs) != 2 or len(readers) != 1 or node is None or not node.is_a("gated_mlp", FUSER):
        return False
    if node.attributes["activation"] not in ACTIVATIONS or node.inputs[0] is not outputs[0]:
        return False
    made.activation, made.gated, made.result = node.attributes["activation"], True, node.output
    taken.add(node)
    return True


def _takes_write(made: Product, own: set[Node], taken: set[Node], tokens: Tokens) -> bool:
    """Queries, keys and values side by side; keys and values are read by the cache write alone."""
    parts = made.main.outputs
    write = next(
        (node for node in own if node.domain == FUSER and node.op in ("rotary_cache_write", "cache_write")), None
    )
    if write is None or len(parts) != 3 or made.main.op != "packed_linear":
        return False
    has_rotary = write.op == "rotary_cache_write"
    sources = write.inputs[:3] if has_rotary else [None, *write.inputs[:2]]
    passed: set[Node] = {write}
    norms: list[Node | None] = []
    for part, source in zip(parts, sources, strict=True):
        reached, value, normed = None, part, None
        while source is not None and value is not source:
            reached = _sole(value, own)
            is_norm = reached is not None and reached.is_a("rms_norm", FUSER) and normed is None
            if reached is None or not (is_norm or keeps_rows(reached, tokens)):
                return False
            normed = reached if is_norm else normed
            passed.add(reached)
            value = reached.output
        if source is not None and _sole(value, {write}) is not write:
            return False
        norms.append(normed)
    q_norm, k_norm, v_norm = norms
    if v_norm is not None or (q_norm is None) != (k_norm is None):
        return False
    if q_norm is not None and k_norm is not None:
        past = write.inputs[-2]
        width = past.shape[-1] if past is not None and past.shape else None
        if not isinstance(width, int) or power_of_two(width) != width:
            return False
        if q_norm.attributes["eps"] != k_norm.attributes["eps"] or not all(
            norm.inputs[1] is not None and norm.inputs[1].constant is not None for norm in (q_norm, k_norm)
        ):
            return False
        made.head_norms = q_norm, k_norm
    made.write = write
    made.result = write.output if has_rotary else parts[0]
    taken |= passed
    return True


def quantized_parts(weight: Constant) -> list[Quantized]:
    """The quantized weights [N, K] that a weight [K, N] is made of, side by side; none where it is not of such alone."""
    parts = weight.parts if isinstance(weight, Joined) else (weight,)
    found = [part.base for part in parts if isinstance(part, Transposed) and isinstance(part.base, Quantized)]
    return found if len(found) == len(parts) else []


def quantized_of(weight: Constant) -> Format | None:
    """The format of a weight that kernels can read as codes: one for all of its parts."""
    parts = quantized_parts(weight)
    formats = {part.format for part in parts}
    format = next(iter(formats)) if len(formats) == 1 else None
    if format is None or format.activations or format.kind not in ("int4", "int8", "nf4"):
        return None
    same = len({part.scales.dtype for part in parts}) == 1
    return replace(format, double=False) if same else None  # scales come decoded


def rounded_of(weight: Constant) -> Format | None:
    """The format of a weight whose product rounds its inputs: one for all of its parts."""
    formats = {part.format for part in quantized_parts(weight)}
    format = next(iter(formats)) if len(formats) == 1 else None
    return format if format is not None and format in (KNOWN["w8a8"], KNOWN["fp8"]) else None


def scale_dtype(weight: Constant) -> str:
    """The element type of a quantized weight's scales, as kernels name it."""
    return {"float16": "fp16", "bfloat16": "bf16"}.get(quantized_parts(weight)[0].scales.dtype.value, "fp32")


def folds(norm: Node, weight: Constant, tables: set[int]) -> bool:
    """Whether a norm's scale can be multiplied into the weight it feeds: both are known, and the weight is no table as well."""
    scales = [value for value in norm.inputs[1:] if value is not None]
    return (
        norm.op in NORMS
        and all(value.constant is not None for value in scales)
        and not {id(leaf) for leaf in weight.leaves()} & tables
    )
