"""`fuser.load(path)`: an ONNX file or a Hugging Face folder as something to call, fused on the way and run by torch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fuser import checkpoints, importer, verification
from fuser.canonicalize.quantized import read_weights
from fuser.compiling import compile
from fuser.errors import FuserError, InputError, UsageError, VerificationError
from fuser.graph import FUSER, Graph
from fuser.layers import steps
from fuser.pipeline import canonicalized, input_roles, rewritten, stage, weight_bytes
from fuser.quantized import unrounded
from fuser.report import Report
from fuser.runtime.executor import Executor
from fuser.runtime.program import check_operators
from fuser.runtime.torch_kernels import KERNELS
from fuser.tensors import to_array, to_tensor
from fuser.verification import Role, Verification

Device: TypeAlias = torch.device | str | None


class Model:
    """A model to call: `model(input_ids=ids)["logits"]`.

    Attributes:
        inputs: the names of its inputs, in order.
        outputs: the names of its outputs, in order.
        report: what was fused, what was not and why, and how the result was verified.
        graph: what is run.
    """

    def __init__(self, graph: Graph, executor: Executor, report: Report) -> None:
        self.graph = graph
        self.executor = executor
        self.report = report
        self.inputs = [value.name for value in graph.inputs]
        self.outputs = list(graph.output_names)

    @property
    def fused(self) -> dict[str, int]:
        """How many of each fusion were found."""
        return self.report.fused

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
    device: Device = None,
    dims: Mapping[str, int] | None = None,
    fuse: bool = True,
    verify: bool = True,
    dtype: torch.dtype | None = None,
) -> Any:
    """Loads a model: an ONNX file, or a folder as `save_pretrained` of Hugging Face transformers writes it.

    Of a file it is a `Model`, whoever wrote it: an exporter, fuser, or ONNX Runtime with its own operators. Of a folder it is
    what `fuser.compile` makes of the module that transformers builds from its config; no code in the folder is run.

    Args:
        path: a file of opset 13 or newer, external data beside it; or a folder with config.json and safetensors.
        device: where it is run; by default the CPU.
        dims: sizes for named dims of a file's inputs, e.g. `{"batch": 1}`.
        fuse: find and replace what fused operators compute.
        verify: prove each rewrite numerically, and compare the fused graph with the original.
        dtype: of a folder's weights; by default the one they are stored in.

    Raises:
        InputError: the file or folder cannot be read.
        UnsupportedOperator: it has an operator that is not computed here.
        UsageError: an unknown dim, or an argument that says nothing of what is loaded.
        VerificationError: the fused graph and the original disagree.
    """
    if Path(path).is_dir():
        if dims is not None or not fuse:
            raise UsageError(
                f"'{path}' is a folder, whose model is compiled for all sizes: dims and fuse are for files"
            )
        return compile(pretrained(Path(path), device, dtype), verify=verify)
    if dtype is not None:
        raise UsageError(f"'{path}' is a file, which says itself what types it has: dtype is for folders")
    report = Report(str(path), "torch")
    with stage(report, "read", _silent):
        graph = importer.load(path, dims)
        read_weights(graph)
        check_operators(graph)
        report.nodes_before, report.weights_bytes_before = len(graph.nodes), weight_bytes(graph)
    if not fuse:
        report.verification = Verification(skipped="nothing was fused")
        return Model(graph, Executor(graph, device=device, kernels=KERNELS), report)
    original, before = graph.clone(), steps(graph)
    canonicalized(graph, report, _silent)
    inputs, unfit = input_roles(graph) if verify else ([], "it was not asked for")
    rewritten(graph, before, report, _silent, verify=verify)
    report.nodes_after, report.weights_bytes_after = len(graph.nodes), weight_bytes(graph)
    made = Model(graph, Executor(graph, device=device, kernels=KERNELS), report)
    with stage(report, "verify", _silent):
        skipped = unfit or verification.too_large(report.weights_bytes_before)
        report.verification = (
            Verification(skipped=skipped) if skipped else _compared(original, made, inputs, Path(path), device)
        )
    return made


def _silent(stage: str) -> None:
    """Tells nobody of a stage."""


def described(folder: Path) -> tuple[Any, Any]:
    """The config of a folder, and the class of transformers that it names first, None where it names none.

    Raises:
        InputError: transformers cannot read it.
        UsageError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError("a Hugging Face folder needs transformers: pip install 'fuser[hf]'") from None
    if not (folder / "config.json").is_file():
        raise InputError(f"'{folder}' has no config.json: it is no folder of Hugging Face transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
    except Exception as error:
        raise _unreadable(folder, error) from None
    return config, next((one for one in named if one is not None), None)


def _unreadable(folder: Path, error: Exception) -> InputError:
    """What transformers raised, on one line: whatever its parts raise, OSError, ValueError, errors of safetensors and JSON."""
    text = " ".join(str(error).split())
    return InputError(f"'{folder}' cannot be loaded: {text[:300] or type(error).__name__}")


def pretrained(folder: Path, device: Device, dtype: torch.dtype | None) -> nn.Module:
    """The module of a folder, of the class its config names.

    Raises:
        InputError: transformers cannot read it.
        UsageError: transformers is not installed.
    """
    config, kind = described(folder)
    import transformers

    try:
        if checkpoints.quantization_of(config) is not None:
            if kind is None:
                raise InputError(f"'{folder}' names no architecture that transformers has")
            return checkpoints.load(folder, config, kind, dtype).to(device)
        module: nn.Module = (kind or transformers.AutoModel).from_pretrained(
            folder, local_files_only=True, dtype=dtype or "auto"
        )
    except FuserError:
        raise
    except Exception as error:
        raise _unreadable(folder, error) from None
    return module.to(device).eval()


def _compared(original: Graph, made: Model, inputs: list[Role], path: Path, device: Device) -> Verification:
    """Runs both on every kind of step that the inputs allow.

    Where activations are rounded, they are as near as results without that rounding: one may fall to the other side.

    Raises:
        VerificationError: they differ by more than the rounding of the coarsest type they compute in.
    """
    plain = Model(original, Executor(original, device=device), made.report)
    rounds = any(node.is_a("fake_quantize", FUSER) for node in made.graph.nodes)
    found = Verification(tolerance=verification.TOLERANCE.get(verification.coarsest(made.graph), 2e-5))
    for case in verification.cases(inputs):
        given = verification.feeds(inputs, case)
        try:
            expected = plain(given)
        except FuserError:  # inputs that were drawn for it are none that it computes with
            continue
        actual, reference = _arrays(made(given)), _arrays(expected)
        found.cases[case.name] = error = verification.worst(actual, reference)
        if rounds and error > found.tolerance:
            with unrounded():
                found.tolerance = max(found.tolerance, verification.worst(_arrays(made(given)), reference))
        if not error <= found.tolerance:
            raise VerificationError(
                f"'{path}': fused, it differs from the original by {error:.1e} on {case.name}, more than {found.tolerance:.1e}"
            )
    return found if found.cases else Verification(skipped="no inputs could be drawn")


def _arrays(outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: to_array(x) for name, x in outputs.items()}


def _tensor(name: str, item: Any) -> Tensor:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, (np.ndarray, np.generic)):
        return to_tensor(np.asarray(item))
    raise InputError(f"input '{name}' must be a torch tensor or a numpy array, got {type(item).__name__}")
