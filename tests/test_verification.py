"""Does the end-to-end check read from a graph what its inputs are for, and draw inputs that the graph takes?"""

import pytest

from fuser.canonicalize import canonicalize
from fuser.importer import load
from fuser.verification import cases, feeds, roles, session
from tests import zoo

GROWING = ["decode", "prefill", "chunk", "padded"]
NO_POSITIONS = ("bloom", "llama_counting", "opt")
# ONNX Runtime runs falcon_alibi from no exporter: the slopes are bfloat16, which TorchScript writes as complex numbers.
EXPORTS = [
    *((architecture, exporter) for architecture, exporter in zoo.MORE_EXPORTS if architecture != "falcon_alibi"),
    ("llama", "transformers-decode"),
    ("mistral", "transformers-chunk"),
    ("gemma2", "optimum"),
]


@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_draws_what_the_graph_takes(architecture: str, exporter: str) -> None:
    path = zoo.exported(architecture, exporter)
    graph = load(path)
    canonicalize(graph)
    found = roles(graph)
    kinds = {role.name: role.kind for role in found}
    assert kinds["input_ids"] == "tokens"
    assert kinds["attention_mask"] == "mask"
    assert kinds.get("position_ids") == ("positions" if "position_ids" in kinds else None)
    assert ("position_ids" in kinds) == (
        architecture not in NO_POSITIONS and (architecture, exporter) != ("gemma2", "optimum")
    )
    drawn = cases(found)
    assert [case.name for case in drawn] == (["decode", "padded"] if exporter == "transformers-decode" else GROWING)
    original = session(str(path), optimize=False)
    for case in drawn:
        if (exporter, case.name) != ("transformers-static", "prefill"):  # a cache of no tokens has no room for any
            assert original.run(None, feeds(found, case))
