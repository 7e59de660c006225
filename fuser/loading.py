"""`fuser.load(path)`: an ONNX file as something to call, fused on the way and run by torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuser import importer, patterns, verification
from fuser.canonicalize import canonicalize
from fuser.errors import FuserError, InputError, VerificationError
from fuser.graph import Graph
from fuser.rewriting import rewrite
from fuser.runtime.executor import Executor
from fuser.runtime.program import check_operators
from fuser.runtime.torch_kernels import KERNELS
from fuser.tensors import to_array, to_tensor


class Model:
    """A model to call: `model(input_ids=ids)["logits"]`.

    Attributes:
        inputs: the names of its inputs, in order.
        outputs: the names of its outputs, in order.
        fused: how many of each fusion were found.
        graph: what is run.
    """

    def __init__(self, graph: Graph, executor: Executor, fused: Mapping[str, int]) -> None:
        self.graph = graph
        self.executor = executor
        self.fused = dict(fused)
        self.inputs = [value.name for value in graph.inputs]
        self.outputs = list(graph.output_names)

    def __call__(self, inputs: Mapping[str, Any] | None = None, /, **named: Any) -> dict[str, Tensor]:
        """The outputs by name, as torch tensors on the model's device.

        Args:
            inputs: by name, torch tensors or numpy arrays; those whose name is a Python identifier may be keywords.

        Raises:
            InputError: an input is missing, unknown, given twice, or not as the model declares it.
        """
        if inputs is not None and not isinstance(inputs, Mapping):
            raise InputError(f"inputs must be a mapping from names to tensors, got {type(inputs).__name__}")
        given = dict(inputs or {})
        if twice := sorted(given.keys() & named.keys()):
            raise InputError(f"input '{twice[0]}' is given twice")
        given |= named
        missing = [name for name in self.inputs if name not in given]
        unknown = [name for name in given if name not in self.inputs]
        if missing or unknown:
            wrong = [f"'{name}' is missing" for name in missing] + [f"'{name}' is unknown" for name in unknown]
            raise InputError(f"{', '.join(wrong)}; the inputs are {', '.join(self.inputs)}")
        outputs = self.executor(*(_tensor(name, given[name]) for name in self.inputs))
        return dict(zip(self.outputs, outputs, strict=True))


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dims: Mapping[str, int] | None = None,
    fuse: bool = True,
    verify: bool = True,
) -> Model:
    """Loads an ONNX file: an exporter's, one that fuser wrote, or one with ONNX Runtime's own operators.

    Args:
        path: opset 13 or newer; external data is found beside it.
        device: where it is run; by default the CPU.
        dims: sizes for named dims of the inputs, e.g. `{"batch": 1}`.
        fuse: find and replace what fused operators compute.
        verify: prove each rewrite numerically, and compare the fused graph with the file's own, both run by torch.

    Raises:
        InputError: the file cannot be read.
        UnsupportedOperator: it has an operator that is not computed here.
        UsageError: an unknown dim.
        VerificationError: the fused graph and the file's own disagree.
    """
    graph = importer.load(path, dims)
    check_operators(graph)
    if not fuse:
        return Model(graph, Executor(graph, device=device, kernels=KERNELS), {})
    original = graph.clone()
    canonicalize(graph)
    found = _roles(graph) if verify else []
    outcome = rewrite(graph, patterns.ALL, verify=verify)
    made = Model(graph, Executor(graph, device=device, kernels=KERNELS), outcome.fused)
    weights = sum(value.constant.nbytes for value in original.constants() if value.constant is not None)
    if found and weights <= verification.WEIGHT_LIMIT_BYTES:
        _compare(Model(original, Executor(original, device=device), {}), made, found, Path(path))
    return made


def _roles(graph: Graph) -> list[verification.Role]:
    """The inputs' roles; none where inputs cannot be made."""
    try:
        return verification.roles(graph)
    except VerificationError:
        return []


def _compare(original: Model, made: Model, found: list[verification.Role], path: Path) -> None:
    """Runs both on every kind of step that the inputs allow.

    Raises:
        VerificationError: they differ by more than the rounding of the coarsest type they compute in.
    """
    tolerance = verification.TOLERANCE.get(verification.coarsest(made.graph), 2e-5)
    for case in verification.cases(found):
        inputs = verification.feeds(found, case)
        try:
            expected = original(inputs)
        except FuserError:  # inputs that were drawn for it are none that it computes with
            continue
        error = verification.worst(
            *({name: to_array(x) for name, x in run.items()} for run in (made(inputs), expected))
        )
        if error > tolerance:
            raise VerificationError(
                f"'{path}': fused, it differs from the original by {error:.1e} on {case.name}, more than {tolerance:.1e}"
            )


def _tensor(name: str, item: Any) -> Tensor:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, (np.ndarray, np.generic)):
        return to_tensor(np.asarray(item))
    raise InputError(f"input '{name}' must be a torch tensor or a numpy array, got {type(item).__name__}")
