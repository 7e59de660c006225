"""Hand-made documents of a diff: a decoder of any number of layers, with each kind of node, fusion and near miss."""

from dataclasses import dataclass, field

from fuser.diff.document import (
    Changed,
    Document,
    Edge,
    Fold,
    Item,
    Kind,
    Miss,
    Pattern,
    Place,
    Region,
    Row,
    Scope,
    Side,
    Tensor,
)

RANK, COLUMN = 56, 110  # px from one box to the next
PATTERNS = ("skip_rms_norm", "qkv_linear", "rotary_cache_write", "attention", "gate_up_linear", "gated_mlp")
NORM = ("Add", "Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul", "Mul")
SHAPES = ("Shape", "Gather", "Unsqueeze", "Concat", "Reshape")  # what canonicalizing removes
ROTARY = ("Slice", "Slice", "Neg", "Concat", "Mul", "Mul", "Add", "Concat")
SCORES = ("Transpose", "MatMul", "Div", "Add", "Softmax", "MatMul", "Transpose")
# A layer: module, operators, the pattern that replaces them (None: removed; "": they stay) and the operator of the result.
BLOCKS: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    ("input_layernorm", NORM, "skip_rms_norm"),
    ("self_attn.q_proj", ("MatMul", "MatMul", "MatMul"), "qkv_linear"),
    ("self_attn", SHAPES, None),
    ("self_attn.rotary_emb", ROTARY, "rotary_cache_write"),
    ("self_attn", SCORES, "attention"),
    ("self_attn.o_proj", ("MatMul",), ""),
    ("post_attention_layernorm", NORM, "skip_rms_norm"),
    ("mlp.gate_proj", ("MatMul", "MatMul"), "gate_up_linear"),
    ("mlp.act_fn", ("Sigmoid", "Mul", "Mul"), "gated_mlp"),
    ("mlp.down_proj", ("MatMul",), ""),
)


@dataclass
class _Graph:
    """A side that grows, node by node; each node reads the one before it and, every other time, the one before that."""

    side: Side
    modules: list[str]
    last: list[int] = field(default_factory=list)

    def add(self, op: str, module: str, layer: int, *extra: int) -> int:
        index = len(self.side.nodes)
        if module not in self.modules:
            self.modules.append(module)
        reads = (*self.last[-1:], *(self.last[-2:-1] if index % 2 else ()), *extra)
        value = self.value(f"{op.rpartition('.')[2].lower()}_{index}", Kind.COMPUTED)
        name = f"/{module.replace('.', '/')}/{op}_{index}"
        item = Item(name, op, self.modules.index(module), layer, "axis=-1" if index % 3 == 0 else "", reads, (value,))
        self.side.nodes.append(item)
        self.last.append(value)
        return index

    def value(self, name: str, kind: Kind) -> int:
        self.side.values.append(Tensor(name, "float32[batch, sequence, 64]", kind))
        return len(self.side.values) - 1


def decoder(layers: int, repeats: int = 1) -> Document:
    """A decoder of so many layers, in each of which the blocks come `repeats` times."""
    made = Document("decoder", Side("decoder.onnx"), Side("decoder.fused.onnx"))
    made.patterns = [Pattern(name, f"What {name} does.", f"patterns/{name}.py:24") for name in PATTERNS]
    before, after = _Graph(made.before, made.modules), _Graph(made.after, made.modules)
    masks = [graph.value("attention_mask", Kind.CHIP) for graph in (before, after)]
    for graph in (before, after):
        graph.last.append(graph.value("input_ids", Kind.INPUT))
        graph.add("Gather", "model.embed_tokens", -1)
        graph.side.layers = [(f"model.layers.{layer}", 0) for layer in range(layers)]
    made.pairs.append((0, 0))
    for layer in range(layers):
        starts = len(made.before.nodes), len(made.after.nodes)
        for _ in range(repeats):
            for module, ops, pattern in BLOCKS:
                _block(made, before, after, masks, f"model.layers.{layer}.{module}", layer, ops, pattern)
        for graph, start in zip((before, after), starts, strict=True):
            graph.side.members.append(list(range(start, len(graph.side.nodes))))
    tail = [graph.add("MatMul", "lm_head", -1) for graph in (before, after)]
    made.changed.append(Changed(tail[0], tail[1], "axis: 1 -> -1"))
    after.add("Cast", "", -1)
    near = [members[40] for members in made.before.members]
    made.misses.append(Miss(2, near[0], "Concat(Neg(b), a)", "Concat(b, a)", "patterns/rotary.py:24", tuple(near[1:])))
    for graph in (before, after):
        graph.side.outputs = [graph.last[-1]]
        _lay_out(graph.side)
    _sum_up(made)
    return made


def _block(
    made: Document,
    before: _Graph,
    after: _Graph,
    masks: list[int],
    module: str,
    layer: int,
    ops: tuple[str, ...],
    pattern: str | None,
) -> None:
    scores = ops is SCORES
    old = tuple(before.add(op, module, layer, *((masks[0],) if scores and op == "Add" else ())) for op in ops)
    if pattern:
        new = after.add(f"fuser.{pattern}", module, layer, *((masks[1],) if scores else ()))
        note, saved = "checked, error 3.1e-07", "24.0 KB a token, 2 launches"
        made.regions.append(Region(PATTERNS.index(pattern), (new,), old, note, saved))
    elif pattern == "":
        made.pairs += [(node, after.add(op, module, layer)) for node, op in zip(old, ops, strict=True)]


def _lay_out(side: Side) -> None:
    """Layers two columns wide, the other nodes in one, above and below."""
    members = side.members[0]
    place = {
        node: (COLUMN * (0.7 + position % 2), RANK * (0.5 + position // 2)) for position, node in enumerate(members)
    }
    first = {value: node for node, item in enumerate(side.nodes) for value in item.outputs}
    edges = []
    for node in members:
        for value in side.nodes[node].inputs:
            source = first.get(value, -1)
            if source in place:
                edges.append(Edge(members.index(source), members.index(node)))
            elif source >= 0:
                edges.append(Edge(None, members.index(node)))
    edges.append(Edge(len(members) - 1, None))
    places = tuple(Place(position, *place[node]) for position, node in enumerate(members))
    layer = Scope(COLUMN * 2.4, RANK * (len(members) / 2 + 0.5), places, tuple(edges))
    middle, end = layer.width / 2, 80 + layer.height + 90
    outside = [node for node, item in enumerate(side.nodes) if item.layer < 0]
    around = [Place(0, middle, 20), Place(-1, middle, 98 + layer.height / 2)]
    around += [Place(node, middle, end + RANK * number) for number, node in enumerate(outside[1:])]
    top = Scope(layer.width, end + RANK * len(outside), tuple(around), (Edge(0, -1), Edge(-1, outside[1])))
    side.scopes = [top, layer]
    side.folds = [Fold(f"model.layers.0-{len(side.layers) - 1}", tuple(range(len(side.layers))), 1)]


def _sum_up(made: Document) -> None:
    operators = len(made.before.nodes), len(made.after.nodes)
    made.summary = [
        Row("operators", f"{operators[0]:,}", f"{operators[1]:,}", f"-{100 - 100 * operators[1] // operators[0]}%"),
        Row("launches a layer", "44", "5"),
        Row("bytes a token", "9.1 MB", "7.8 MB"),
        Row("weights", "7.6 MB", "7.6 MB"),
        Row("verified error", "", "7.7e-07", "relative; decode, prefill"),
    ]
