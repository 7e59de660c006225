"""Where the values of a program being composed are, rows of tokens and pages of keys and values, and how they get there."""

from collections.abc import Sequence
from typing import Any

from fuser import dims
from fuser.codegen.arrangement import arrangement, keeps_rows
from fuser.codegen.code_values import EXPONENTS
from fuser.codegen.elementwise import Column, Computed, Elementwise, Row, elementwise
from fuser.codegen.embedding import Embedding, embedding
from fuser.codegen.kernel import Kernel
from fuser.codegen.kv_groups import group_of
from fuser.codegen.linear import MOST_TOKENS
from fuser.codegen.plan import grouped, split
from fuser.codegen.program import Argument, Cached, Held, Input, Part, Program, Rows, State, Step, Weight
from fuser.codegen.rotary import Rotary
from fuser.codegen.step_inputs import inputs_of, is_integer, past_of, shifted, tokens_of, without_padding
from fuser.codegen.tuning import Problem, Table
from fuser.content import content
from fuser.errors import UnsupportedOperator
from fuser.graph import FUSER, Graph, Node, Origin, Value


class Places:
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

    def rows_at(self, value: Value | None, reader: Node | None) -> Rows | Part:
        """Where the rows of a value are, for those who read it; views of rows are those rows."""
        if value in self.places:
            place = self.places[value]
            return self.selected(place, reader) if reader in self.tail else place
        node = value.producer if value is not None else None
        if node is not None and keeps_rows(node, self.tokens):
            return self.rows_at(node.inputs[0], reader)
        raise refused(reader, f"'{value.name if value is not None else ''}' is no row for each token")

    def selected(self, place: Rows | Part, reader: Node | None) -> Rows | Part:
        """Of rows those that outputs are made of."""
        if isinstance(place, Part):
            return Part(self.selection(place.rows, reader), place.start, place.stop)
        return self.selection(place, reader)

    def selection(self, rows: Rows, reader: Node | None) -> Rows:
        """Of whole rows those that outputs are made of, copied once."""
        if rows.selected:
            return rows
        if rows not in self.chosen:
            self.chosen[rows] = made = Rows(rows.width, selected=True)
            what = Embedding(rows.width, (self.made.tokens,), dtype=self.made.dtype)
            nodes = [reader] if reader is not None else []
            self.add(embedding(what), what, [Input("logit_rows"), rows, made], nodes)
        return self.chosen[rows]

    def whole(self, value: Value | None, reader: Node) -> Rows:
        """Where the rows of a value are one after another; columns of wider rows are copied."""
        rows = self.rows_at(value, reader)
        if isinstance(rows, Rows):
            return rows
        copy = Computed("Identity", (("input", 0),))
        what = Elementwise(rows.width, (Row(),), (copy,), (0,), dtype=self.made.dtype)
        y = Rows(rows.width, rows.rows.selected)
        self.add(elementwise(what), what, [rows, y], [reader])
        return y

    def new(self, value: Value, node: Node) -> Rows:
        """Rows for a value that a step is about to make."""
        found = arrangement(value, self.tokens)
        if found is None:
            raise refused(node, f"'{value.name}' is not one row for each token")
        self.places[value] = rows = Rows(found.width, node in self.tail)
        return rows

    def add(
        self, kernel: Kernel, what: Any, arguments: Sequence[Argument], nodes: Sequence[Node], *, each: bool = False
    ) -> None:
        """One more launch, for some nodes; `each`: with workspace for each sequence."""
        origin = Origin.union(node.origin for node in nodes)
        self.made.steps.append(Step("kernel", arguments, origin, kernel, what, by_sequence=each))

    def kernel_of(self, problem: Problem) -> Kernel:
        """The kernel that was chosen for a problem."""
        return problem.kernel(self.table.chosen(problem))

    def norm(self, node: Node, *, scaled: bool) -> Rows:
        """The rows of a norm, made once; not `scaled`, its scale and shift are in the weights that follow."""
        if (node, scaled) not in self.normed:
            x = self.rows_at(node.inputs[0], node)
            # Without its scale it is no value of the graph.
            y = self.new(node.output, node) if scaled else Rows(x.width, node in self.tail)
            self.normed[node, scaled] = y
            vectors = [vector(v, node) for v in node.inputs[1:] if v is not None] if scaled else []
            operands = tuple(("input", i) for i in range(1 + len(vectors)))
            steps = (Computed(node.op, operands, float(node.attributes["eps"])),)
            what = Elementwise(y.width, (Row(), *[Column()] * len(vectors)), steps, (0,), dtype=self.made.dtype)
            self.add(elementwise(what), what, [x, *vectors, y], [node])
        return self.normed[node, scaled]

    def rotary(self, write: Node, width: int) -> Rotary:
        """A cache write as its family describes it; `width`: of queries, keys and values together."""
        past = write.inputs[-2]
        assert past is not None
        if past.shape is None or not isinstance(past.shape[1], int) or not isinstance(past.shape[3], int):
            raise refused(write, "the cache's heads and their width are not known")
        G, D = past.shape[1], past.shape[3]
        if write.inputs[-1] is None or write.inputs[-1].shape is None or write.inputs[-1].shape[3] != D:
            raise refused(write, "keys and values differ in width")
        turns = write.op == "rotary_cache_write"
        rotary_dim = write.attributes["rotary_dim"] if turns else 0
        interleaved = bool(write.attributes["interleaved"]) if turns else False
        return Rotary(
            width // D - 2 * G, G, D, rotary_dim, self.made.page, interleaved, dtype=self.made.dtype,
            kv_group=group_of(self.made.kv_group, D),
        )  # fmt: skip

    def written(self, write: Node, turning: Rotary) -> dict[str, Argument]:
        """The tensors of a cache write: tables, places and the cache."""
        state = self._state(write)
        tensors: dict[str, Argument] = {"positions": Input("positions"), "slot_mapping": Input("slot_mapping", state)}
        tensors |= dict(zip(turning.caches, self.cached(state), strict=True))
        if turning.rotary_dim:
            tensors |= self._rotary_tables(write)
        return tensors

    def cached(self, state: State) -> list[Argument]:
        """The tensors that hold a state, scales of int8 after keys and values."""
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
                raise refused(write, f"its {name} is no table of a closed form")
            positions, frequencies = node.inputs[:2]
            if frequencies is None or frequencies.constant is None:
                raise refused(node, "the frequencies are not known")
            start = self.position(positions, node)
            tables[name] = Weight(
                "sin" if value.index else "cos",
                frequencies.constant,
                start=start,
                factor=float(node.attributes["scale"]),
            )
        return tables

    def position(self, value: Value | None, reader: Node) -> int:
        """What positions are ahead of the step's, for a value that holds positions."""
        source, ahead = shifted(value)
        if source in self.inputs and (self.inputs[source] == "positions" or reader.is_a("rotary_table", FUSER)):
            return ahead
        node = source.producer if source is not None else None
        if node is not None and node.is_a("position_ids", FUSER):
            is_counted = node.input(2) is not None
            if is_counted or dims.equal(content(node.inputs[1]), self.past):
                return int(node.attributes["offset"]) + ahead
        raise refused(reader, f"'{value.name if value is not None else ''}' does not hold the positions of tokens")


def _tail(graph: Graph) -> set[Node]:
    """The nodes that follow the last attention and what is written and looked up: they can leave out rows."""
    before: set[Node] = set()
    for node in reversed(graph.nodes):
        looks_up = node.op in ("attention", "rotary_cache_write", "cache_write", "Gather") or is_integer(node)
        if looks_up or any(user in before for output in node.outputs for user in output.consumers):
            before.add(node)
    return {node for node in graph.nodes if node not in before}


def refused(node: Node | None, reason: str) -> UnsupportedOperator:
    """Why there is no program, and the node for which there is none."""
    what = "an output" if node is None else f"{node.op} '{node.output.name}'"
    where = f" at {node.origin.module}" if node is not None and node.origin.module else ""
    return UnsupportedOperator(f"no step over pages: {what}{where}: {reason}")


def vector(value: Value | None, reader: Node) -> Weight:
    """A norm's scale or shift."""
    if value is None or value.constant is None:
        raise refused(reader, "its scale is not known")
    return Weight("vector", value.constant)


def is_selected(rows: Argument) -> bool:
    return rows.rows.selected if isinstance(rows, Part) else isinstance(rows, Rows) and rows.selected
