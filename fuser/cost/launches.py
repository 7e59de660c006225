"""The operator table of a shape on a device: eager torch before, the launches of the fused program after.

Three layers are made, with random weights; operators of the same kind run on the three in turn, so that what they read is not
in the cache. On a CUDA device launches are timed in CUDA graphs, of emitted kernels; on the CPU, reference kernels one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuser.codegen.kv_groups import kv_group_of
from fuser.cost import eager
from fuser.cost.gpus import card_of
from fuser.cost.modules import LAYERS, graph_of
from fuser.cost.prediction import costs, names, predict
from fuser.cost.profile import Clock, Measure, Profile, cpu_ceilings, timed
from fuser.cost.workload import Shape
from fuser.errors import UsageError
from fuser.pipeline import Progress
from fuser.quantizing import choices, quantized
from fuser.stepping import DTYPES, Bound, Stepper

PAGE = 16


def profile(
    shape: Shape, *, batch: int, context: int = 512, dtype: str = "bf16", device: str = "cuda", quantize: str | None = None,
    kv: str = "auto", note: Progress | None = None,
) -> Profile:  # fmt: skip
    """The operator table of a decode step.

    Args:
        batch: sequences, a new token each, of `context` tokens with it.
        device: cuda or cpu.
        quantize, kv: of the fused program; before fusion all is of `dtype`.

    Raises:
        UsageError: there is no such device, or no model of such a shape.
    """
    if dtype not in DTYPES:
        raise UsageError(f"a dtype is {', '.join(DTYPES)}, not {dtype!r}")
    place, note = torch.device(device), note or (lambda stage: None)
    is_gpu = place.type == "cuda"
    if is_gpu and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device: --device cpu, or a model's file, is profiled on the CPU")
    clock, copy, product = _machine(is_gpu)
    note("measure before")
    before = [
        Measure(
            op.name, shape.layers if op.is_layer else 1, clock(_each(op.calls), len(op.calls)), op.bytes, op.flops,
            op.launches,
        )
        for op in eager.operators(shape, batch, context, DTYPES[dtype], place, LAYERS)
    ]  # fmt: skip
    if is_gpu:
        torch.cuda.empty_cache()
    note("fuse")
    made = graph_of(shape, note=note)
    if quantize is not None:
        made.graph = quantized(made.graph, choices(quantize), device=place)
    note("measure after")
    bound, inputs = _bound(made.graph, batch, context, dtype, place, kv)
    asked = {cost.name: cost for cost in costs(bound.program, made, batch, context)}
    after, rest = [], 0.0  # rest: what other layers than those that are made take
    for name, cost in asked.items():
        launches = [one for one, own in zip(bound.launches, names(bound.program), strict=True) if own == name]
        took = clock(lambda i, own=launches: own[i](inputs), len(launches))  # type: ignore[misc]
        after.append(Measure(name, _count(name, len(launches), made.layers), took, cost.bytes, cost.flops))
        rest += took * (after[-1].count - len(launches))
    step = clock(lambda i: bound.run(inputs), 1) + rest
    name = torch.cuda.get_device_name(place) if is_gpu else "CPU, reference kernels"
    card = card_of(name) if is_gpu else None
    predicted = predict(made, card, batch=batch, context=context, dtype=dtype, kv=kv).seconds * 1e6 if card else None
    return Profile(shape.name, name, dtype, batch, context, copy, product, before, after, step, predicted)


def _count(name: str, launches: int, layers: int) -> int:
    """How many a model has of what three layers have `launches` of: so many a layer, and the rest once."""
    return launches if name == "embedding" else launches // LAYERS * layers + launches % LAYERS


def _each(calls: list[Callable[[], object]]) -> Callable[[int], object]:
    return lambda i: calls[i]()


def _machine(is_gpu: bool) -> tuple[Clock, float, float]:
    """How time is told, and the ceilings: GB/s of a copy, TFLOP/s of a product."""
    if not is_gpu:
        return timed, *cpu_ceilings(torch.get_num_threads())
    from fuser.trials import copy_rate, measured, product_rate

    return measured, copy_rate(), product_rate()


def _bound(graph: Any, n: int, context: int, dtype: str, place: torch.device, kv: str) -> tuple[Bound, dict[str, Any]]:
    """The program of a step with its memory, its floating-point weights random, and inputs of sequences at `context`."""
    is_gpu = place.type == "cuda"
    blocks = -(-context // PAGE)
    stepper = Stepper(
        graph, dtype=dtype, device=place, pages=n * blocks, page=PAGE, positions=max(context, 16),
        kernels="triton" if is_gpu else "reference", kv_group=kv_group_of(kv, dtype),
    )  # fmt: skip
    bound = stepper.bound(n, decode=is_gpu, rows=None if is_gpu else n)
    for held in stepper.weights.made.values():
        if held.is_floating_point() and held.dim() == 2 and held.element_size() > 1 and 0 not in held.stride():
            held.normal_(std=held.shape[-1] ** -0.5)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": place}
    table = torch.arange(n * blocks, **integers).reshape(n, blocks)
    slots: Tensor = table[:, -1] * PAGE + (context - 1) % PAGE
    groups = max(stepper.groups.values(), default=0) + 1
    inputs: dict[str, Any] = {
        "tokens": torch.zeros(n, **integers), "positions": torch.full((n,), context - 1, **integers),
        "slot_mapping": slots.expand(groups, n).contiguous(), "block_table": table.expand(groups, n, blocks).contiguous(),
        "context_lens": torch.full((n,), context, **integers), "query_starts": torch.arange(n + 1, **integers),
        "logit_rows": torch.arange(n, **integers), "longest": 1,
    }  # fmt: skip
    bound(**inputs)  # compiles, and every row holds numbers
    return bound, inputs
