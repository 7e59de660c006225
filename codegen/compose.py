"""From the plan of a fused graph to a program: every launch a kernel, bound to weights, rows of tokens and paged caches.

A launch is read into its family's description; what the family does not have follows as a kernel or an operator of its own.
Outside attention and the cache a graph must be token-wise: each token's row is computed from its row.
"""

from collections.abc import Sequence

from fuser.codegen.arrangement import arrangement, keeps_rows
from fuser.codegen.attention import Attention
from fuser.codegen.compose_places import refused
from fuser.codegen.compose_products import Products
from fuser.codegen.compose_rows import Run
from fuser.codegen.elementwise import elementwise
from fuser.codegen.embedding import Embedding, embedding
from fuser.codegen.kernel import ACTIVATIONS
from fuser.codegen.kv_groups import group_of
from fuser.codegen.linear import MOST_TOKENS
from fuser.codegen.plan import ELEMENTWISE, NORMS
from fuser.codegen.program import Argument, Input, Program, Rows, Step, Weight
from fuser.codegen.rotary import rotary_cache_write
from fuser.codegen.step_inputs import is_integer, shifted
from fuser.codegen.tuning import Problem, Table
from fuser.constants import Constant
from fuser.errors import UsageError
from fuser.graph import FUSER, Graph, Node, Value

MASKED = -1e4  # a number that is added to scores to mask them is at most this
CONTEXT = 1024  # keys of a sequence for which decode attention is laid out, without a search
# What is done to each token by itself, along other axes than the tokens'.
INDEPENDENT = ELEMENTWISE | {
    "Softmax",
    "Pow",
    "Reciprocal",
    "Concat",
    "Slice",
    "Split",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
}

ALONG = ("Softmax", "Concat", "Split", "Slice", "MatMul", *sorted(NORMS))  # what works along axes


def compose(
    graph: Graph, *, dtype: str, tokens: int, page: int = 16, decode: bool | None = None, table: Table | None = None,
    rows: int | None = None, kv_group: int = 0, codes: bool = True,
) -> Program:  # fmt: skip
    """The program of a fused decoder for at most `tokens` new tokens, by the choices of `table`, or by default ones.

    Quantized weights are read as codes, with `codes` and where kernels can; otherwise they are numbers when they are loaded.

    With `decode`, by default where there are at most 64, every sequence has one new token; without, each has any number,
    and with `rows` outputs are of at most so many tokens, which each step chooses. With `kv_group` pages are int8, by groups of
    so many channels of a head, or of all of them where there are less.

    Raises:
        UnsupportedOperator: a node is not token-wise, or what it reads of the past is not what pages hold.
    """
    decode = tokens <= MOST_TOKENS if decode is None else decode
    if tokens < 1:
        raise UsageError(f"codegen: a step takes 1 or more tokens, not {tokens}")
    if rows is not None and (decode or rows < 1):
        raise UsageError(f"codegen: of 1 or more rows a step that is no decode gives outputs, not of {rows}")
    return _Composer(graph, dtype, tokens, page, decode, table or Table(""), rows, kv_group, codes).program()


class _Composer(Products):
    """One program being composed, launch after launch."""

    def program(self) -> Program:
        for launch in self.launches:
            if launch.family == "linear" and self.is_product(launch):
                self._nodes(self.product(launch))
            elif launch.family == "attention":
                main, *others = launch.nodes
                self._attention(main)
                self._nodes(others)
            elif launch.family != "positions" and not self.is_rounded_at_once(launch):
                self._nodes(launch.nodes)
        for value in self.graph.outputs:
            if value not in self.states:
                place = self.rows_at(value, value.producer)
                self.made.outputs[value.name] = (
                    place if self.made.rows is None else self.selected(place, value.producer)
                )
        for state, windows in self.windows.items():
            known = [window for window in windows if window is not None]
            state.window = max(known) if len(known) == len(windows) else None
        self.made.share()
        return self.made

    def _attention(self, node: Node) -> None:
        q, k, v = node.inputs[:3]
        if k is None or v is None or k.producer is not v.producer or k not in self.states or not k.index < v.index:
            raise refused(node, "its keys and values are not those of one cache")
        state = self.states[k]
        H, G = node.attributes["heads"]
        window = _window(node.input(3), node)
        self.windows.setdefault(state, []).append(window)
        what = Attention(
            H,
            G,
            state.head_dim,
            float(node.attributes["scale"]),
            self.made.page,
            window,
            float(node.attributes["softcap"]),
            dtype=self.made.dtype,
            kv_group=group_of(self.made.kv_group, state.head_dim),
        )
        tensors: list[Argument] = [self.whole(q, node), *self.cached(state)]
        tensors += [Input("block_table", state), Input("context_lens")]
        if not self.decode:
            tensors += [Input("query_starts"), Input("longest")]
        y = self.new(node.output, node)
        sequences, keys = (self.made.tokens, min(CONTEXT, window or CONTEXT)) if self.decode else (1, CONTEXT)
        kernel = self.kernel_of(Problem(what, sequences, keys, self.decode))
        self.add(kernel, what, [*tensors, y], [node], each=self.decode)

    def _nodes(self, nodes: Sequence[Node]) -> None:
        """Nodes that are part of no product or attention, as few row-wise kernels as can be, in order."""
        run = Run(self.tokens)
        for node in nodes:
            if keeps_rows(node, self.tokens) or is_integer(node):
                continue
            if self.is_rounding(node):
                self._rowwise(run)
                run = Run(self.tokens)
                self.round_rows(node)
                continue
            if all((node in self.tail) == (other in self.tail) for other in run.nodes[:1]) and run.takes(node):
                continue
            self._rowwise(run)
            run = Run(self.tokens)
            if node.domain == FUSER and node.op in ("rotary_cache_write", "cache_write"):
                self._write(node)
            elif node.is_a("Gather"):
                self._gather(node)
            elif not run.takes(node):
                self._by_torch(node)
        self._rowwise(run)

    def _rowwise(self, run: Run) -> None:
        """The kernel of what has been taken together."""
        if len(run.nodes) == 1 and run.nodes[0].op in NORMS and len(run.row) == 1:
            self.norm(run.nodes[0], scaled=True)
        elif run.nodes:
            own = set(run.nodes)
            outputs = run.outputs(lambda value: value.is_output or any(user not in own for user in value.consumers))
            what = run.what(outputs, self.made.dtype)
            inputs = [
                Weight("vector", key) if isinstance(key, Constant) else self.rows_at(key, run.nodes[0])
                for key in run.inputs
            ]
            made = [self.new(value, run.nodes[0]) for value in outputs]
            self.add(elementwise(what), what, [*inputs, *made], run.nodes)

    def _write(self, node: Node) -> None:
        """A cache write of its own: of queries, keys and values that are rows each."""
        turns = node.op == "rotary_cache_write"
        sources = [self.rows_at(value, node) for value in node.inputs[: 3 if turns else 2]]
        if not turns:  # no queries: the keys stand in for them, and what is made of them is not looked at
            sources = [sources[0], *sources]
        turning = self.rotary(node, sum(source.width for source in sources))
        tensors = self.written(node, turning) | dict(zip("qkv", sources, strict=True))
        tensors["turned"] = self.new(node.output, node) if turns else Rows(sources[0].width)
        self.add(rotary_cache_write(turning), turning, [tensors[name] for name in turning.tensors], [node])

    def _gather(self, node: Node) -> None:
        """Rows of a table, by tokens or by positions."""
        table, index = node.inputs[:2]
        if (
            table is None
            or table.constant is None
            or index is None
            or node.attributes.get("axis", 0) not in (0, -len(table.shape or ()))
        ):
            raise refused(node, "it looks up nothing that is known, or not rows of it")
        given, ahead = shifted(index)
        if given is not None and self.inputs.get(given) == "tokens" and not ahead:
            source, start = Input("tokens"), 0
        else:
            source, start = Input("positions"), self.position(index, node)
        if start < 0:
            raise refused(node, "it looks up rows before the first")
        rows = table.constant.shape[0] - start
        self.places[node.output] = y = Rows(table.constant.size // table.constant.shape[0])
        what = Embedding(y.width, (rows,), dtype=self.made.dtype)
        self.add(embedding(what), what, [source, Weight("table", table.constant, start=start), y], [node])

    def _by_torch(self, node: Node) -> None:
        """A node that no kernel computes yet; it must be token-wise."""
        weight = node.input(1)
        is_product = node.is_a("MatMul") and weight is not None and weight.constant is not None
        is_fused = node.domain == FUSER and node.op in NORMS | ACTIVATIONS.keys() | {"fake_quantize"}
        if not (is_product or is_fused or (not node.domain and node.op in INDEPENDENT)):
            raise refused(node, "what it does is not known to be done to each token by itself")
        given: list[Argument] = [
            self.rows_at(value, node) for value in node.inputs if value is not None and value.constant is None
        ]
        axes = node.attributes.get("axes", node.attributes.get("axis", -1))
        for value in node.inputs:
            found = arrangement(value, self.tokens)
            if found is not None and node.op in ALONG:
                rank = len(found.row) + 2
                if any(axis % rank in (0, found.axis) for axis in ([axes] if isinstance(axes, int) else axes)):
                    raise refused(node, "it works along the tokens")
        made = [self.new(output, node) for output in node.outputs]
        self.made.steps.append(Step("nodes", [*given, *made], node.origin, nodes=[node], reason="no kernel has it"))


def _window(mask: Value | None, node: Node) -> int | None:
    """The keys that a query sees, its own included; None for all before it. Pages hold no padding."""
    maker = mask.producer if mask is not None else None
    if maker is not None and maker.is_a("Where"):
        chosen, kept, masked = (value for value in maker.inputs)
        numbers = [value.scalar if value is not None else None for value in (kept, masked)]
        if numbers[0] != 0 or numbers[1] is None or numbers[1] > MASKED:
            raise refused(node, "its mask adds other numbers than 0 and the lowest")
        maker = chosen.producer if chosen is not None else None
    if maker is None or not maker.is_a("attention_mask", FUSER):
        raise refused(node, "its mask has no closed form" if mask is not None else "it sees the tokens that follow")
    if maker.attributes["right_window"] != 0:
        raise refused(node, "it sees tokens that follow")
    left = maker.attributes["left_window"]
    return left + 1 if left >= 0 else None
