"""Element-wise nodes between products, read into one row-wise kernel as long as their rows are alike."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fuser.codegen.arrangement import Arrangement, Tokens, arrangement, keeps_rows
from fuser.codegen.elementwise import EXPRESSIONS, NORMS, Column, Computed, Elementwise, Input, Operand, Row
from fuser.codegen.kernel import ACTIVATIONS, LONGEST_ROW
from fuser.constants import Constant
from fuser.graph import FUSER, Node, Value


@dataclass(eq=False)
class Run:
    """Nodes that one row-wise kernel computes, as far as they are read."""

    tokens: Tokens
    nodes: list[Node] = field(default_factory=list)
    steps: list[Computed] = field(default_factory=list)
    inputs: dict[Value | Constant, Input] = field(default_factory=dict)  # in order
    made: dict[Value, int] = field(default_factory=dict)  # by which step
    row: tuple[int, ...] = ()  # the dims of a row

    def takes(self, node: Node) -> bool:
        """Adds a node, if the kernel can compute it too."""
        found = arrangement(node.output, self.tokens)
        op = _operator(node)
        if op is None or found is None or (self.nodes and found.row != self.row) or not _has_norm_width(node, found):
            return False
        row, inputs = self.row, dict(self.inputs)
        self.row = found.row
        operands = [self._operand(value) for value in node.inputs if value is not None]
        known = [operand for operand in operands if operand is not None]
        if len(known) < len(operands) or not any(isinstance(operand, tuple) for operand in known):
            self.row, self.inputs = row, inputs
            return False
        eps = float(node.attributes.get("eps", 0.0)) if op in NORMS else 0.0
        self.made[node.output] = len(self.steps)
        self.steps.append(Computed(op, tuple(known), eps, str(node.attributes.get("activation", ""))))
        self.nodes.append(node)
        return True

    def _operand(self, value: Value) -> Operand | None:
        if value.scalar is not None and (value.constant is not None and value.constant.size == 1):
            return value.scalar
        if value.constant is not None:
            size = value.constant.size
            if not self.row or size != self.row[-1] or value.constant.shape[-1] != size:
                return None
            return self._input(value.constant, Column())
        while value not in self.made and value.producer is not None and keeps_rows(value.producer, self.tokens):
            assert value.producer.inputs[0] is not None
            value = value.producer.inputs[0]
        if value in self.made:
            return "step", self.made[value]
        found = arrangement(value, self.tokens)
        width = Arrangement(1, self.row).width
        return self._input(value, Row()) if found is not None and found.width == width else None

    def _input(self, key: Value | Constant, kind: Input) -> Operand:
        self.inputs.setdefault(key, kind)
        return "input", list(self.inputs).index(key)

    def outputs(self, is_read: Callable[[Value], bool]) -> list[Value]:
        """What others read, of all that the run makes."""
        return [value for value in self.made if is_read(value)]

    def what(self, outputs: list[Value], dtype: str) -> Elementwise:
        groups = Arrangement(1, self.row[:-1]).width
        steps, stored = tuple(self.steps), tuple(self.made[value] for value in outputs)
        return Elementwise(self.row[-1], tuple(self.inputs.values()), steps, stored, groups, dtype)


def _operator(node: Node) -> str | None:
    if node.is_a("gated_mlp", FUSER):
        return "gated" if node.attributes["activation"] in ACTIVATIONS else None
    if node.domain == FUSER:
        return node.op if node.op in NORMS or node.op in ACTIVATIONS else None
    floats = all(v is None or (v.dtype is not None and v.dtype.is_float) for v in (*node.inputs, node.output))
    present = sum(v is not None for v in node.inputs)
    fits = node.op in EXPRESSIONS and EXPRESSIONS[node.op].count("{}") == present
    return node.op if floats and fits and not node.domain else None


def _has_norm_width(node: Node, found: Arrangement) -> bool:
    """Whether a norm, if it is one, is over the end of a row, and not over the tokens."""
    return node.op not in NORMS or (found.axis <= len(found.row) and found.row[-1] <= LONGEST_ROW)
