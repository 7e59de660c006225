"""From the plan of a fused graph to a program: every launch a kernel, bound to weights, rows of tokens and paged caches.

A launch is read into its family's description; what the family does not have follows as a kernel or an operator of its own.
Outside attention and the cache a graph must be token-wise: each token's row is computed from its row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fuser import dims
from fuser.codegen.arrangement import arrangement, keeps_rows
from fuser.codegen.attention import Attention
from fuser.codegen.compose_linear import Product, folds, product_of, quantized_of, rounded_of, scale_dtype
from fuser.codegen.compose_rows import Run
from fuser.codegen.elementwise import Column, Computed, Elementwise, Row, elementwise
from fuser.codegen.embedding import Embedding, embedding
from fuser.codegen.kernel import ACTIVATIONS, Kernel
from fuser.codegen.kv_groups import group_of
from fuser.codegen.linear import MOST_TOKENS, Linear
from fuser.codegen.matmul import Matmul, default_tiles, matmul
from fuser.codegen.plan import ELEMENTWISE, NORMS, Launch, grouped, split
from fuser.codegen.program import Argument, Cached, Held, Input, Part, Program, Rows, Scratch, State, Step, Weight
from fuser.codegen.quantized import EXPONENTS, Dequantize, dequantize
from fuser.codegen.rotary import Rotary, rotary_cache_write
from fuser.codegen.rounding import Rounding, rounding
from fuser.codegen.step_inputs import inputs_of, is_integer, past_of, shifted, tokens_of, without_padding
from fuser.codegen.tuning import Problem, Table
from fuser.constants import Constant
from fuser.content import content
from fuser.errors import UnsupportedOperator, UsageError
from fuser.formats import Format
from fuser.graph import FUSER, Graph, Node, Origin, Value

MASKED = -1e4  # a number that is added to scores to mask them is at most this
CODES: dict[str, Any] = {"weight": "codes", "scales": "scales", "zeros": "zeros"}
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


class _Composer:
    """One program being composed; `places` are where the values are that steps have made."""

    def __init__(
        self,
        graph: Graph,
        dtype: str,
        tokens: int,
        page: int,
        decode: bool,
        table: Table,
        rows: int | None,
        kv_group: int,
        codes: bool,
    ) -> None:
        self.graph = graph = split(graph)
        self.inputs = inputs_of(graph)
        self.tokens = tokens_of(self.inputs)
        self.past = past_of(graph)
        without_padding(graph, dims.add(self.past, self.tokens.sequence))
        self.launches = grouped(graph, "decode")
        self.decode, self.table = decode, table
        self.codes = codes and dtype in EXPONENTS
        # Whether products write to the cache: not int8, which costs them more than a launch of its own.
        self.writes = not kv_group
        self.few = decode and tokens <= MOST_TOKENS  # whether products are kernels of few tokens
        nodes = [node for launch in self.launches for node in launch.nodes]
        self.made = Program(dtype, tokens, page, self.tokens, decode, rows, kv_group=kv_group)
        self.tail = _tail(graph) if rows is not None else set[Node]()
        gathered = [node.inputs[0] for node in nodes if node.is_a("Gather")]
        self.tables = {
            id(leaf) for v in gathered if v is not None and v.constant is not None for leaf in v.constant.leaves()
        }
        self.places: dict[Value, Rows | Part] = {}
        self.states: dict[Value, State] = {}  # by present keys and present values
        self.windows: dict[State, list[int | None]] = {}  # of those who read it
        self.normed: dict[tuple[Node, bool], Rows] = {}
        self.chosen: dict[Rows, Rows] = {}  # rows, and the selected ones of them
        self.rounded: dict[Value, tuple[Rows, Rows]] = {}  # rows of eight bits, and their scales

    def program(self) -> Program:
        for launch in self.launches:
            if launch.family == "linear" and self._is_product(launch):
                self._linear(launch)
            elif launch.family == "attention":
                main, *others = launch.nodes
                self._attention(main)
                self._nodes(others)
            elif launch.family != "positions" and not self._is_rounded_at_once(launch):
                self._nodes(launch.nodes)
        for value in self.graph.outputs:
            if value not in self.states:
                place = self._rows(value, value.producer)
                self.made.outputs[value.name] = (
                    place if self.made.rows is None else self._selected(place, value.producer)
                )
        for state, windows in self.windows.items():
            known = [window for window in windows if window is not None]
            state.window = max(known) if len(known) == len(windows) else None
        self.made.share()
        return self.made

    # Where values are

    def _rows(self, value: Value | None, reader: Node | None) -> Rows | Part:
        """Where the rows of a value are, for those who read it; views of rows are those rows."""
        if value in self.places:
            place = self.places[value]
            return self._selected(place, reader) if reader in self.tail else place
        node = value.producer if value is not None else None
        if node is not None and keeps_rows(node, self.tokens):
            return self._rows(node.inputs[0], reader)
        raise _refused(reader, f"'{value.name if value is not None else ''}' is no row for each token")

    def _selected(self, place: Rows | Part, reader: Node | None) -> Rows | Part:
        """Of rows those that outputs are made of."""
        if isinstance(place, Part):
            return Part(self._selection(place.rows, reader), place.start, place.stop)
        return self._selection(place, reader)

    def _selection(self, rows: Rows, reader: Node | None) -> Rows:
        if rows.selected:
            return rows
        if rows not in self.chosen:
            self.chosen[rows] = made = Rows(rows.width, selected=True)
            what = Embedding(rows.width, (self.made.tokens,), dtype=self.made.dtype)
            nodes = [reader] if reader is not None else []
            self._add(embedding(what), what, [Input("logit_rows"), rows, made], nodes)
        return self.chosen[rows]

    def _whole(self, value: Value | None, reader: Node) -> Rows:
        """Where the rows of a value are one after another; columns of wider rows are copied."""
        rows = self._rows(value, reader)
        if isinstance(rows, Rows):
            return rows
        copy = Computed("Identity", (("input", 0),))
        what = Elementwise(rows.width, (Row(),), (copy,), (0,), dtype=self.made.dtype)
        y = Rows(rows.width, rows.rows.selected)
        self._add(elementwise(what), what, [rows, y], [reader])
        return y

    def _new(self, value: Value, node: Node) -> Rows:
        found = arrangement(value, self.tokens)
        if found is None:
            raise _refused(node, f"'{value.name}' is not one row for each token")
        self.places[value] = rows = Rows(found.width, node in self.tail)
        return rows

    def _add(
        self, kernel: Kernel, what: Any, arguments: Sequence[Argument], nodes: Sequence[Node], *, each: bool = False
    ) -> None:
        origin = Origin.union(node.origin for node in nodes)
        self.made.steps.append(Step("kernel", arguments, origin, kernel, what, by_sequence=each))

    def _chosen(self, problem: Problem) -> Kernel:
        return problem.kernel(self.table.chosen(problem))

    # Products

    def _is_product(self, launch: Launch) -> bool:
        """Whether whole rows meet one matrix, and not the parts of a row, or each its own."""
        main = next(node for role, node in launch.parts if role == "main")
        x, weight = arrangement(main.inputs[0], self.tokens), main.inputs[1]
        shape = weight.shape if weight is not None else None
        return x is not None and shape is not None and len(shape) == 2 and x.row == shape[:1]

    def _linear(self, launch: Launch) -> None:
        found = product_of(launch, self.tokens, few=self.few, writes=self.writes)
        node, before = found.main, found.norm
        if self.codes and (format := quantized_of(found.weight)) is not None:
            self._of_codes(launch, found, format)
            return
        if node.inputs[0] in self.rounded and (format := rounded_of(found.weight)) is not None:
            self._of_eight_bits(launch, format)
            return
        folded = before is not None and folds(before, found.weight, self.tables)
        scale, shift = (_constant(before, i) if folded else None for i in (1, 2))
        weight = Weight("linear", found.weight, scale)
        bias = self._bias(found, weight, shift)
        kind = None
        if before is None:
            x = self._whole(node.inputs[0], node)
        elif folded and self.few:
            x, kind = self._whole(before.inputs[0], before), "rms" if before.op == "rms_norm" else "layer"
        else:
            x = self._norm(before, scaled=not folded)
            x = self._selection(x, node) if node in self.tail else x
        tensors: dict[str, Argument] = {"x": x, "weight": weight}
        if kind == "layer":
            tensors["column_sums"] = Weight("column_sums", found.weight, scale)
        if bias is not None:
            tensors["bias"] = bias
        if found.residual is not None:
            tensors["residual"] = self._whole(found.residual, node)
        if self.few:
            self._small(found, tensors, kind, before)
        else:
            tensors["y"] = self._results(found)
            what = tuple(name for name in ("x", "weight", "bias", "residual", "y") if name in tensors)
            self.made.steps.append(Step("product", [tensors[name] for name in what], launch.origin, what=what))
        self._nodes(found.left)

    def _of_codes(self, launch: Launch, found: Product, format: Format) -> None:
        """A product with codes: of few tokens in one launch, of many a product of torch with the weight made just before."""
        node, before = found.main, found.norm
        if before is None:
            x = self._whole(node.inputs[0], node)
        else:
            x = self._norm(before, scaled=True)
            x = self._selection(x, node) if node in self.tail else x
        # Codes are in the order of the kernel of few tokens, whoever reads them.
        described = self._described(product_of(launch, self.tokens, few=True, writes=self.writes), None, None, {})
        described = replace(described, format=format, scale_dtype=scale_dtype(found.weight))
        held = {name: Weight(kind, found.weight, product=described) for name, kind in CODES.items()}
        if format.symmetric:
            del held["zeros"]
        tensors: dict[str, Argument] = {"x": x, **held}
        tensors |= self._added(found)
        if self.few:
            self._small(found, tensors, None, None, format)
        else:
            K, N = found.weight.shape
            made = Scratch(N, K)
            undone = Dequantize(described)
            self._add(dequantize(undone), undone, [*held.values(), made], [node])
            tensors |= {"weight": made, "y": self._results(found)}
            what = tuple(name for name in ("x", "weight", "bias", "residual", "y") if name in tensors)
            self.made.steps.append(Step("product", [tensors[name] for name in what], launch.origin, what=what))
        self._nodes(found.left)

    def _added(self, found: Product) -> dict[str, Argument]:
        """The bias and the residual of a product that takes no norm."""
        added: dict[str, Argument] = {}
        if found.bias is not None:
            added["bias"] = Weight("bias", found.bias)
        if found.residual is not None:
            added["residual"] = self._whole(found.residual, found.main)
        return added

    def _is_rounding(self, node: Node) -> bool:
        """Whether all that read a node's rounded rows are products of eight bits."""
        return (
            self.codes
            and node.is_a("fake_quantize", FUSER)
            and not node.output.is_output
            and all(
                (user.is_a("MatMul") or user.is_a("packed_linear", FUSER))
                and (weight := user.input(1)) is not None
                and weight.constant is not None
                and rounded_of(weight.constant) is not None
                for user in node.output.consumers
            )
        )

    def _is_rounded_at_once(self, launch: Launch) -> bool:
        """Whether a launch is a norm that whoever rounds its rows computes: nothing else reads it."""
        node, *others = launch.nodes
        readers = node.output.consumers
        return (
            not others
            and node.op in NORMS
            and node.domain == FUSER
            and not node.output.is_output
            and len(readers) == 1
            and self._is_rounding(readers[0])
            and all(value is None or value.constant is not None for value in node.inputs[1:])
        )

    def _rounding(self, node: Node) -> None:
        """Rows in eight bits, of the norm before them where that is part of it."""
        value = node.inputs[0]
        assert value is not None
        norm = value.producer if value not in self.places else None
        is_norm = norm is not None and norm.op in NORMS and norm.domain == FUSER
        tensors: dict[str, Argument] = {}
        eps = 0.0
        if is_norm and norm is not None:
            tensors["x"], eps = self._rows(norm.inputs[0], norm), float(norm.attributes["eps"])
            for name, vector in zip(("weight", "bias"), norm.inputs[1:], strict=False):
                if vector is not None:
                    tensors[name] = _vector(vector, norm)
        else:
            tensors["x"] = self._rows(value, node)
        width, kind = _columns(tensors["x"]), node.attributes["kind"]  # type: ignore[arg-type]
        selected = node in self.tail
        if selected and not _is_selected(tensors["x"]):
            tensors["x"] = self._selected(tensors["x"], node)  # type: ignore[arg-type]
        tensors["y"], tensors["scales"] = Rows(width, selected, dtype=kind), Rows(1, selected, dtype="fp32")
        what = Rounding(
            width, kind, self.made.dtype, None if not is_norm or norm is None else "rms" if norm.op == "rms_norm" else "layer",
            eps, "weight" in tensors, "bias" in tensors,
        )  # fmt: skip
        made = [norm, node] if is_norm and norm is not None else [node]
        self._add(rounding(what), what, [tensors[name] for name in what.tensors], made)
        self.rounded[node.output] = tensors["y"], tensors["scales"]  # type: ignore[assignment]

    def _of_eight_bits(self, launch: Launch, format: Format) -> None:
        """A product of eight bits by a kernel, of few tokens and of many."""
        found = product_of(launch, self.tokens, few=self.few, writes=self.writes, gates=True)
        node = found.main
        assert node.inputs[0] is not None
        x, x_scales = self.rounded[node.inputs[0]]
        tensors: dict[str, Argument] = {
            "x": x, "x_scales": x_scales,
            "weight": Weight("eights", found.weight), "scales": Weight("row_scales", found.weight),
        }  # fmt: skip
        tensors |= self._added(found)
        if self.few:
            self._small(found, tensors, None, None, format)
        else:
            K, N = found.weight.shape
            large = Matmul(
                N, K, self.made.dtype, bias="bias" in tensors, activation=found.activation, gated=found.gated,
                residual="residual" in tensors, kind=format.kind,
            )  # fmt: skip
            tensors["y"] = self._results(found)
            self._add(
                matmul(large, default_tiles(large, self.made.tokens)),
                large,
                [tensors[name] for name in large.tensors],
                found.nodes,
            )
        self._nodes(found.left)

    def _small(
        self, found: Product, tensors: dict[str, Argument], kind: Any, before: Node | None, format: Format | None = None
    ) -> None:
        """A product of few tokens, all in one launch."""
        what = self._described(found, kind, before, tensors)
        if format is not None:
            what = replace(what, format=format, scale_dtype=scale_dtype(found.weight))
        if found.write is not None and what.rotary is not None:
            tensors |= self._written(found.write, what.rotary)
        for name, node in zip("qk", found.head_norms or (), strict=False):
            tensors[f"{name}_norm_weight"] = _vector(node.inputs[1], node)
        tensors["y"] = self._results(found)
        self._add(self._chosen(Problem(what)), what, [tensors[name] for name in what.tensors], found.nodes)

    def _described(self, found: Product, kind: Any, before: Node | None, tensors: Mapping[str, Argument]) -> Linear:
        """A product of few tokens as its family describes it."""
        K, N = found.weight.shape
        return Linear(
            N, K, self.made.tokens, self.made.dtype, norm=kind, bias="bias" in tensors, activation=found.activation,
            norm_eps=float(before.attributes["eps"]) if kind and before is not None else 0.0,
            gated=found.gated or found.activation is None,
            residual="residual" in tensors, rotary=self._rotary(found.write, N) if found.write is not None else None,
            head_norm_eps=found.head_norms[0].attributes["eps"] if found.head_norms else None,
        )  # fmt: skip

    def _results(self, found: Product) -> Rows:
        """The rows of a product; of several results side by side, a part for each."""
        outputs = found.main.outputs
        if len(outputs) == 1 or found.result is not outputs[0] or found.write is not None:
            return self._new(found.result, found.main)
        parts = [arrangement(output, self.tokens) for output in outputs]
        widths = [part.width for part in parts if part is not None]
        if len(widths) < len(parts):
            raise _refused(found.main, "its results are not one row for each token")
        rows, start = Rows(sum(widths), found.main in self.tail), 0
        for output, width in zip(outputs, widths, strict=True):
            self.places[output] = Part(rows, start, start + width)
            start += width
        return rows

    def _bias(self, found: Product, weight: Weight, shift: Constant | None) -> Weight | None:
        if found.bias is None and shift is None:
            return None
        return Weight("bias", found.bias, shift=shift, linear=None if shift is None else found.weight)

    def _norm(self, node: Node, *, scaled: bool) -> Rows:
        """The rows of a norm, made once; not `scaled`, its scale and shift are in the weights that follow."""
        if (node, scaled) not in self.normed:
            x = self._rows(node.inputs[0], node)
            # Without its scale it is no value of the graph.
            y = self._new(node.output, node) if scaled else Rows(_columns(x), node in self.tail)
            self.normed[node, scaled] = y
            vectors = [_vector(v, node) for v in node.inputs[1:] if v is not None] if scaled else []
            operands = tuple(("input", i) for i in range(1 + len(vectors)))
            steps = (Computed(node.op, operands, float(node.attributes["eps"])),)
            what = Elementwise(y.width, (Row(), *[Column()] * len(vectors)), steps, (0,), dtype=self.made.dtype)
            self._add(elementwise(what), what, [x, *vectors, y], [node])
        return self.normed[node, scaled]

    # Cache and attention

    def _rotary(self, write: Node, width: int) -> Rotary:
        past = write.inputs[-2]
        assert past is not None
        if past.shape is None or not isinstance(past.shape[1], int) or not isinstance(past.shape[3], int):
            raise _refused(write, "the cache's heads and their width are not known")
        G, D = past.shape[1], past.shape[3]
        if write.inputs[-1] is None or write.inputs[-1].shape is None or write.inputs[-1].shape[3] != D:
            raise _refused(write, "keys and values differ in width")
        turns = write.op == "rotary_cache_write"
        rotary_dim = write.attributes["rotary_dim"] if turns else 0
        interleaved = bool(write.attributes["interleaved"]) if turns else False
        return Rotary(
            width // D - 2 * G, G, D, rotary_dim, self.made.page, interleaved, dtype=self.made.dtype,
            kv_group=group_of(self.made.kv_group, D),
        )  # fmt: skip

    def _written(self, write: Node, turning: Rotary) -> dict[str, Argument]:
        """The tensors of a cache write: tables, places and the cache."""
        state = self._state(write)
        tensors: dict[str, Argument] = {"positions": Input("positions"), "slot_mapping": Input("slot_mapping", state)}
        tensors |= dict(zip(turning.caches, self._cached(state), strict=True))
        if turning.rotary_dim:
            tensors |= self._rotary_tables(write)
        return tensors

    def _cached(self, state: State) -> list[Argument]:
        kinds: tuple[Held, ...] = ("k", "v", "k_scale", "v_scale")
        return [Cached(state, which) for which in (kinds if self.made.kv_group else kinds[:2])]

    def _state(self, write: Node) -> State:
        past_k, past_v = write.inputs[-2:]
        assert past_k is not None and past_v is not None and past_k.shape is not None
        G, D = past_k.shape[1], past_k.shape[3]
        assert isinstance(G, int) and isinstance(D, int)
        state = State((past_k.name, past_v.name), G, D)
        self.made.states.append(state)
        self.states |= dict.fromkeys(write.outputs[-2:], state)
        return state

    def _rotary_tables(self, write: Node) -> dict[str, Argument]:
        tables: dict[str, Argument] = {}
        for name, value in zip(("cos", "sin"), write.inputs[3:5], strict=True):
            node = value.producer if value is not None else None
            while node is not None and node.op in ("Unsqueeze", "Squeeze", "Reshape", "Cast"):
                value = node.inputs[0]
                node = value.producer if value is not None else None
            if node is None or not node.is_a("rotary_table", FUSER) or value is None:
                raise _refused(write, f"its {name} is no table of a closed form")
            positions, frequencies = node.inputs[:2]
            if frequencies is None or frequencies.constant is None:
                raise _refused(node, "the frequencies are not known")
            start = self._position(positions, node)
            tables[name] = Weight(
                "sin" if value.index else "cos",
                frequencies.constant,
                start=start,
                factor=float(node.attributes["scale"]),
            )
        return tables

    def _position(self, value: Value | None, reader: Node) -> int:
        """What positions are ahead of the step's, for a value that holds positions."""
        source, ahead = shifted(value)
        if source in self.inputs and (self.inputs[source] == "positions" or reader.is_a("rotary_table", FUSER)):
            return ahead
        node = source.producer if source is not None else None
        if node is not None and node.is_a("position_ids", FUSER):
            is_counted = node.input(2) is not None
            if is_counted or dims.equal(content(node.inputs[1]), self.past):
                return int(node.attributes["offset"]) + ahead
        raise _refused(reader, f"'{value.name if value is not None else ''}' does not hold the positions of tokens")

    def _attention(self, node: Node) -> None:
        q, k, v = node.inputs[:3]
        if k is None or v is None or k.producer is not v.producer or k not in self.states or not k.index < v.index:
            raise _refused(node, "its keys and values are not those of one cache")
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
        tensors: list[Argument] = [self._whole(q, node), *self._cached(state)]
        tensors += [Input("block_table", state), Input("context_lens")]
        if not self.decode:
            tensors += [Input("query_starts"), Input("longest")]
        y = self._new(node.output, node)
        sequences, keys = (self.made.tokens, min(CONTEXT, window or CONTEXT)) if self.decode else (1, CONTEXT)
        kernel = self._chosen(Problem(what, sequences, keys, self.decode))
        self._add(kernel, what, [*tensors, y], [node], each=self.decode)

    # Everything else

    def _nodes(self, nodes: Sequence[Node]) -> None:
        """Nodes that are part of no product or attention, as few row-wise kernels as can be, in order."""
        run = Run(self.tokens)
        for node in nodes:
            if keeps_rows(node, self.tokens) or is_integer(node):
                continue
            if self._is_rounding(node):
                self._rowwise(run)
                run = Run(self.tokens)
                self._rounding(node)
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
            self._norm(run.nodes[0], scaled=True)
        elif run.nodes:
            own = set(run.nodes)
            outputs = run.outputs(lambda value: value.is_output or any(user not in own for user in value.consumers))
            what = run.what(outputs, self.made.dtype)
            inputs = [
                Weight("vector", key) if isinstance(key, Constant) else self._rows(key, run.nodes[0])
                for key in run.inputs
            ]
            made = [self._new(value, run.nodes[0]) for value in outputs]
            self._add(elementwise(what), what, [*inputs, *made], run.nodes)

    def _write(self, node: Node) -> None:
        """A cache write of its own: of queries, keys and values that are rows each."""
        turns = node.op == "rotary_cache_write"
        sources = [self._rows(value, node) for value in node.inputs[: 3 if turns else 2]]
        if not turns:  # no queries: the keys stand in for them, and what is made of them is not looked at
            sources = [sources[0], *sources]
        turning = self._rotary(node, sum(map(_columns, sources)))
        tensors = self._written(node, turning) | dict(zip("qkv", sources, strict=True))
        tensors["turned"] = self._new(node.output, node) if turns else Rows(_columns(sources[0]))
        self._add(rotary_cache_write(turning), turning, [tensors[name] for name in turning.tensors], [node])

    def _gather(self, node: Node) -> None:
        """Rows of a table, by tokens or by positions."""
        table, index = node.inputs[:2]
        if (
            table is None
            or table.constant is None
            or index is None
            or node.attributes.get("axis", 0) not in (0, -len(table.shape or ()))
        ):
            raise _refused(node, "it looks up nothing that is known, or not rows of it")
        given, ahead = shifted(index)
        if given is not None and self.inputs.get(given) == "tokens" and not ahead:
            source, start = Input("tokens"), 0
        else:
            source, start = Input("positions"), self._position(index, node)
        if start < 0:
            raise _refused(node, "it looks up rows before the first")
        rows = table.constant.shape[0] - start
        self.places[node.output] = y = Rows(table.constant.size // table.constant.shape[0])
        what = Embedding(y.width, (rows,), dtype=self.made.dtype)
        self._add(embedding(what), what, [source, Weight("table", table.constant, start=start), y], [node])

    def _by_torch(self, node: Node) -> None:
        """A node that no kernel computes yet; it must be token-wise."""
        weight = node.input(1)
        is_product = node.is_a("MatMul") and weight is not None and weight.constant is not None
        is_fused = node.domain == FUSER and node.op in NORMS | ACTIVATIONS.keys() | {"fake_quantize"}
        if not (is_product or is_fused or (not node.domain and node.op in INDEPENDENT)):
            raise _refused(node, "what it does is not known to be done to each token by itself")
        given: list[Argument] = [
            self._rows(value, node) for value in node.inputs if value is not None and value.constant is None
        ]
        axes = node.attributes.get("axes", node.attributes.get("axis", -1))
        for value in node.inputs:
            found = arrangement(value, self.tokens)
            if found is not None and node.op in ALONG:
                rank = len(found.row) + 2
                if any(axis % rank in (0, found.axis) for axis in ([axes] if isinstance(axes, int) else axes)):
                    raise _refused(node, "it works along the tokens")
        made = [self._new(output, node) for output in node.outputs]
        self.made.steps.append(Step("nodes", [*given, *made], node.origin, nodes=[node], reason="no kernel has it"))


def _tail(graph: Graph) -> set[Node]:
    """The nodes that follow the last attention and what is written and looked up: they can leave out rows."""
    before: set[Node] = set()
    for node in reversed(graph.nodes):
        looks_up = node.op in ("attention", "rotary_cache_write", "cache_write", "Gather") or is_integer(node)
        if looks_up or any(user in before for output in node.outputs for user in output.consumers):
            before.add(node)
    return {node for node in graph.nodes if node not in before}


def _refused(node: Node | None, reason: str) -> UnsupportedOperator:
    what = "an output" if node is None else f"{node.op} '{node.output.name}'"
    where = f" at {node.origin.module}" if node is not None and node.origin.module else ""
    return UnsupportedOperator(f"no step over pages: {what}{where}: {reason}")


def _constant(node: Node | None, index: int) -> Constant | None:
    value = node.input(index) if node is not None else None
    return value.constant if value is not None else None


def _vector(value: Value | None, reader: Node) -> Weight:
    if value is None or value.constant is None:
        raise _refused(reader, "its scale is not known")
    return Weight("vector", value.constant)


def _is_selected(rows: Argument) -> bool:
    return rows.rows.selected if isinstance(rows, Part) else isinstance(rows, Rows) and rows.selected


def _columns(rows: Rows | Part) -> int:
    return rows.width


def _window(mask: Value | None, node: Node) -> int | None:
    """The keys that a query sees, its own included; None for all before it. Pages hold no padding."""
    maker = mask.producer if mask is not None else None
    if maker is not None and maker.is_a("Where"):
        chosen, kept, masked = (value for value in maker.inputs)
        numbers = [value.scalar if value is not None else None for value in (kept, masked)]
        if numbers[0] != 0 or numbers[1] is None or numbers[1] > MASKED:
            raise _refused(node, "its mask adds other numbers than 0 and the lowest")
        maker = chosen.producer if chosen is not None else None
    if maker is None or not maker.is_a("attention_mask", FUSER):
        raise _refused(node, "its mask has no closed form" if mask is not None else "it sees the tokens that follow")
    if maker.attributes["right_window"] != 0:
        raise _refused(node, "it sees tokens that follow")
    left = maker.attributes["left_window"]
    return left + 1 if left >= 0 else None
