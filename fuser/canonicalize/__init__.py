"""Removing what exporters add, by true identities only, until nothing changes.

After it exporters differ little, and what is structurally different stays a variant in a pattern. Each rule looks at one
node and says whether it changed anything; the graph is valid after each.
"""

from fuser.canonicalize import (  # importing a module enters its rules
    attention,  # noqa: F401
    folding,  # noqa: F401
    forms,  # noqa: F401
    layout,  # noqa: F401
    linear,  # noqa: F401
    noops,  # noqa: F401
    quantized,  # noqa: F401
)
from fuser.canonicalize.rules import GENERAL, RULES
from fuser.canonicalize.sharing import share
from fuser.graph import Graph
from fuser.shapes import infer_node

ROUNDS = 12


def canonicalize(graph: Graph) -> None:
    """Brings a graph to the one form patterns are written for. The graph stays valid throughout."""
    for round_ in range(ROUNDS):
        changed = 0
        for node in list(graph.nodes):
            if node not in graph.nodes:
                continue
            infer_node(graph, node)
            changed += sum(
                1
                for rule in (*RULES.get((node.domain, node.op), ()), *GENERAL)
                if node in graph.nodes and rule(graph, node)
            )
        changed += share(graph) + graph.prune() + graph.learn()
        graph.sort()
        if not changed and round_:
            break


__all__ = ["canonicalize"]
