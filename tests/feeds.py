"""What the zoo's graphs are fed and what they give: cases by a graph's own signature, runs, torch's answer, errors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from tests import architectures
from tests.architectures import WINDOW, V

Array: TypeAlias = NDArray[Any]
Feeds: TypeAlias = dict[str, Array]
Step: TypeAlias = tuple[int, int, int, int]  # batch, new tokens, past, padding on the left of the first sequence

STEPS: dict[str, Step] = {
    "decode": (1, 1, 9, 0),
    "prefill": (1, 7, 0, 0),
    "chunk": (1, 3, 5, 0),
    "padded": (2, 3, 5, 2),
}
SINGLE: dict[str, Step] = {"decode": (1, 1, 9, 0), "padded": (2, 1, 5, 2)}
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def cases(source: Path | str | onnxruntime.InferenceSession) -> dict[str, Feeds]:
    """Random feeds for a graph, the same ones each time, by what a serving engine would be doing.

    `decode`: one token on a past of 9. `prefill`: 7 tokens on none. `chunk`: 3 tokens on 5. `padded`: two sequences of
    3 tokens on 5, the first with two tokens of padding on its left. A graph without a past gets those tokens alone; one
    that takes a single token gets `decode`, and a `padded` of one token on 5.

    Raises:
        ValueError: the graph has an input of another kind.
    """
    signature = _signature(source)
    steps = SINGLE if _takes_one_token(signature) else STEPS
    return {name: _feeds(signature, step, seed) for seed, (name, step) in enumerate(steps.items())}


def padded_prefill(source: Path | str | onnxruntime.InferenceSession) -> Feeds:
    """Two sequences on no past, the first with padding on its left: the queries of the padding may attend to nothing."""
    signature = _signature(source)
    return _feeds(signature, (2, 1, 0, 1) if _takes_one_token(signature) else (2, 3, 0, 2), seed=9)


def feeds(
    source: Path | str | onnxruntime.InferenceSession,
    batch: int,
    new: int,
    past: int,
    *,
    padding: int = 0,
    seed: int = 0,
) -> Feeds:
    """Random feeds: `new` tokens a sequence on `past`, the first with `padding` tokens of padding on its left."""
    return _feeds(_signature(source), (batch, new, past, padding), seed)


def _signature(source: Path | str | onnxruntime.InferenceSession) -> Sequence[Any]:
    session = source if isinstance(source, onnxruntime.InferenceSession) else _session(source)
    inputs: Sequence[Any] = session.get_inputs()
    return inputs


def _takes_one_token(signature: Sequence[Any]) -> bool:
    return any(entry.name == "input_ids" and entry.shape[-1] == 1 for entry in signature)


def _feeds(signature: Sequence[Any], step: Step, seed: int) -> Feeds:
    batch, new, past, padding = step
    random = np.random.RandomState(seed)
    if not any(_is_state(entry) for entry in signature):
        past = 0
    # A cache of a fixed size is written in place, from the counter that it comes with; the mask is as long as it is.
    counted = any(entry.name.endswith(".cumulative_length") for entry in signature)
    room = past + new + (2 if counted else 0)
    mask = np.ones((batch, past + new), np.int64)
    mask[0, :padding] = 0
    visible = np.zeros((batch, 1, new, room), np.bool_)
    visible[..., : past + new] = (np.arange(past + new) <= np.arange(past, past + new)[:, None]) & mask[
        :, None, None
    ] > 0
    known = {
        "input_ids": random.randint(0, V, (batch, new)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
        "token_type_ids": random.randint(0, 2, (batch, new)),
        "cumulative_length": np.array(past),
        "_sliding_window_tensor": np.array(WINDOW),  # goes through as it is: the window itself is in the graph
    }
    made: Feeds = {}
    for entry in signature:
        name = entry.name.rpartition(".")[2]
        if _is_state(entry):
            _, heads, _, width = map(_size, entry.shape)
            state = random.standard_normal((batch, heads, room if counted else past, width))
            made[entry.name] = state.astype(DTYPES[entry.type])
        elif name in known:
            array = visible if name == "attention_mask" and len(entry.shape) == 4 else known[name]
            made[entry.name] = array.astype(DTYPES[entry.type])
        else:
            raise ValueError(f"no feeds for input {entry.name} {entry.type} {entry.shape}, only for {list(known)}")
    return made


def _is_state(entry: Any) -> bool:
    return "past_key_values." in entry.name and len(entry.shape) == 4


def _size(dim: int | str | None) -> int:
    """A dim as a number; transformers' exporter writes some numbers as names. -1 where it is dynamic."""
    return int(dim) if isinstance(dim, int) or (dim or "").isdecimal() else -1


def run(path: Path | str, feeds: Feeds, *, optimize: bool = True) -> dict[str, Array]:
    """Every output by name, of the file in ONNX Runtime on two CPU threads, with or without its graph optimizations."""
    session = _session(path, optimize=optimize)
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _session(path: Path | str, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    if optimize:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Fail:
        # Up to 1.30 a Cast of float16 to float16 loads only with the basic optimizations, which drop it (onnxruntime 29235).
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def reference(architecture: str, feeds: Feeds, *, layers: int = 2, attn: str = "eager") -> dict[str, Array]:
    """What torch itself gives for those feeds, in float32, by the names that `standard` gives.

    A cache of a fixed size is compared as far as it is filled.
    """
    flat = architectures.flat_model(architecture, layers=layers, attn=attn)
    known, filled = standard(feeds), _filled(feeds)
    batch = len(feeds["input_ids"])
    if feeds["attention_mask"].ndim == 4:
        known["attention_mask"] = feeds["attention_mask"][:, 0, -1, : filled + feeds["input_ids"].shape[1]].astype(
            np.int64
        )
    inputs = []
    for name, dims in flat.inputs.items():
        if name in known:
            array = known[name][:, :, :filled] if name.startswith("past_key_values.") else known[name]
        elif name == "position_ids":  # a graph that is not told them counts every token
            new, total = feeds["input_ids"].shape[1], feeds["attention_mask"].shape[1]
            array = np.broadcast_to(np.arange(total - new, total), (batch, new)).copy()
        else:
            array = np.zeros([batch, dims[1], 0, dims[3]], np.float32)
        inputs.append(torch.from_numpy(array))
    outputs = flat(*(t.float() if t.is_floating_point() else t for t in inputs))
    return {name: t.numpy() for name, t in zip(flat.outputs, outputs, strict=True)}


def _filled(feeds: Feeds) -> int | None:
    """How much of a cache of a fixed size is the past; None where all of it is."""
    return next((int(array) for name, array in feeds.items() if name.endswith(".cumulative_length")), None)


def standard(arrays: Mapping[str, Array], *, length: int | None = None) -> dict[str, Array]:
    """Inputs or outputs under the names that `torch.onnx.export` was given: past_key_values.0.key, present.0.value ...

    What transformers' exporter calls input.past_key_values.layers.0.keys, output.past_key_values.layers.0.keys, or
    past_key_values.layers.0.keys where only one of them is. Its counters, which are no tensors of the model, are left out.

    Args:
        arrays: by the names of the file.
        length: of caches of a fixed size, that of the part to keep.
    """
    found = {}
    for name, array in arrays.items():
        state = re.fullmatch(r"(input\.|output\.|)past_key_values\.layers\.(\d+)\.(key|value)s", name)
        if state is not None:
            kind = "past_key_values" if state[1] == "input." else "present"
            found[f"{kind}.{state[2]}.{state[3]}"] = array[:, :, :length]
        elif not name.endswith((".cumulative_length", "._sliding_window_tensor")):
            found[name] = array
    return found


def relative_error(actual: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
    """The largest ||a - r|| / ||r|| of the outputs, in float64; infinite where a NaN or an infinity is involved.

    Raises:
        ValueError: the two differ in their outputs or in a shape.
    """
    if actual.keys() != reference.keys():
        raise ValueError(f"outputs differ: {sorted(actual)} and {sorted(reference)}")
    worst = 0.0
    for name, expected in reference.items():
        if actual[name].shape != expected.shape:
            raise ValueError(f"{name}: {actual[name].shape}, reference {expected.shape}")
        r = expected.astype(np.float64)
        difference = float(np.linalg.norm(actual[name].astype(np.float64) - r))
        if difference > 0 or np.isnan(difference):
            norm = float(np.linalg.norm(r))
            error = difference / norm if norm > 0 else np.inf
            worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst
