"""What a model costs: memory, traffic and arithmetic on paper, and times measured operator by operator."""

import os
from collections.abc import Mapping
from pathlib import Path

from fuser.cost.gpus import GPU, chosen
from fuser.cost.planning import OURS, TALK, Assumptions, Plan, plan_on
from fuser.cost.workload import Shape, Workload, of_shape, shape_named

__all__ = ["GPU", "OURS", "TALK", "Assumptions", "Plan", "Shape", "Workload", "plan", "workload"]


def workload(model: "str | os.PathLike[str] | Shape | Workload", *, shapes: Path | None = None) -> Workload:
    """What a model asks for, operator by operator.

    Args:
        model: a name of `models/shapes.toml`, an ONNX file, a Hugging Face folder (its config alone is read), or a Shape.
        shapes: a file of more shapes.

    Raises:
        InputError: the model cannot be read, or is not a decoder.
        UsageError: there is none of that name.
    """
    if isinstance(model, Workload):
        return model
    if isinstance(model, Shape):
        return of_shape(model)
    path = Path(model)
    if path.exists():
        from fuser.cost.analysis import workload_of

        return workload_of(path)
    return of_shape(shape_named(str(model), shapes))


def plan(
    model: "str | os.PathLike[str] | Shape | Workload", gpu: "str | GPU", *, quantize: str | None = None, kv: str = "auto",
    dtype: str = "fp16", tp: int = 1, seqlen: int = 512, batch: int | None = None, assumptions: Assumptions = OURS,
    among: Mapping[str, GPU] | None = None,
) -> Plan:  # fmt: skip
    """The memory plan of a model on a GPU, and how long a decode step takes there at least.

    Args:
        model: as of `workload`.
        gpu: a name of `gpus.toml`, or of `among`, or a GPU.
        quantize: a format for weights, as of `fuser.quantize`.
        kv: the element type of keys and values: auto (`dtype`), int8, int8:GROUP.
        dtype: of weights, activations and cache: fp16, bf16 or fp32.
        tp: cards over which each layer is divided.
        seqlen: tokens of a sequence.
        batch: sequences; by default as many as fit.

    Raises:
        InputError, UsageError: as `workload`; or a GPU, a format or a number is not one that can be.
    """
    card = gpu if isinstance(gpu, GPU) else chosen([gpu], among)[0]
    return plan_on(
        workload(model), card, quantize=quantize, kv=kv, dtype=dtype, tp=tp, seqlen=seqlen, batch=batch, assumptions=assumptions
    )  # fmt: skip
