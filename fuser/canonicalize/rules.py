"""The table of canonicalization rules, and the two moves they make: emit a node, become a value."""

from collections.abc import Callable, Iterable
from typing import Any

from fuser.graph import FUSER, MICROSOFT, Graph, Node, Origin, Value
from fuser.shapes import infer_node

Rule = Callable[[Graph, Node], bool]
RULES: dict[tuple[str, str], list[Rule]] = {}
GENERAL: list[Rule] = []

# Results differ from call to call: never folded, never shared.
IMPURE = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout",
     "BiasDropout", "BitmaskDropout", "BitmaskBiasDropout", "Sampling"}
)  # fmt: skip
PURE_DOMAINS = frozenset({"", FUSER, MICROSOFT})  # nothing is known of an operator of another


def rule(*ops: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers a rule for some operators; for every node when none is named."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES.setdefault((domain, op), []).append(function)
        if not ops:
            GENERAL.append(function)
        return function

    return register


def emit(
    graph: Graph,
    like: Node,
    op: str,
    inputs: Iterable[Value | None],
    attributes: dict[str, Any] | None = None,
    domain: str = "",
    *,
    absorbing: Node | None = None,
) -> Value:
    """A new node's output; the node stands for `like`, in its place, and for `absorbing` where it takes that in too."""
    node = graph.add(op, inputs, attributes, domain=domain, outputs=[like.output.name], like=like)
    if absorbing is not None:
        node.origin = Origin.union((absorbing.origin, like.origin))
    infer_node(graph, node)
    return node.output


def become(graph: Graph, node: Node, new: Value) -> bool:
    """Replaces a node's only output and removes the node, unless a control-flow body reads it by name."""
    if any(value.captured for value in node.outputs):
        return False
    old = node.output
    new.dtype = new.dtype or old.dtype
    graph.replace(old, new)
    if not any(value.uses or value.is_output for value in node.outputs):
        graph.remove(node)
        if new.producer is not None and new.name.startswith(f"{old.name}_"):
            old.name, new.name = new.name, old.name  # what was emitted in its place takes its name
    return True


def sole(value: Value | None, node: Node) -> bool:
    """Whether `node` is the only reader of `value`."""
    return value is not None and not value.pinned and value.consumers == [node]
