"""`torch.compile(model, backend="fuser")`: each graph that dynamo captures is fused, or runs as it is, with a reason."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fuser.compilation import Compilation, Options
from fuser.errors import FuserError

log = logging.getLogger("fuser")

LAST = 64  # graphs whose reasons are kept

fallbacks: list[str] = []
"""Why graphs ran as they were captured, the last of them."""


def backend(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A function that runs a graph of dynamo, for inference: it is compiled when it is first called.

    A graph with an operator that fuser does not know, or one that is asked for gradients, runs as it was captured; why is
    logged once and kept in `fallbacks`.
    """
    return _Captured(module, example_inputs)


class _Bound(nn.Module):
    """A graph with its parameters, which dynamo passes as arguments, in their places."""

    def __init__(self, module: GraphModule, held: dict[int, Tensor], count: int) -> None:
        super().__init__()
        self.module, self.held, self.count = module, held, count
        for index, tensor in held.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"held_{index}", tensor)
            else:
                self.register_buffer(f"held_{index}", tensor)

    def forward(self, *given: Any) -> Any:
        rest = iter(given)
        return self.module(*(getattr(self, f"held_{i}") if i in self.held else next(rest) for i in range(self.count)))


class _Captured:
    def __init__(self, module: GraphModule, example_inputs: Sequence[Any]) -> None:
        self.module = module
        self.held = {i: x for i, x in enumerate(example_inputs) if _is_static(x)}
        bound = _Bound(module, self.held, len(example_inputs))
        self.needs_gradients = any(x.requires_grad for x in self.held.values())
        self.compilation = Compilation(
            bound, Options(dynamic=True, backend="auto", verify=True, note=lambda stage: None)
        )
        self.reason = ""

    def __call__(self, *args: Any) -> Any:
        given = [x for i, x in enumerate(args) if i not in self.held]
        reason = self.reason
        if not reason and torch.is_grad_enabled() and (self.needs_gradients or any(map(_wants_gradient, given))):
            reason = "it is asked for gradients; call it under torch.no_grad()"
        elif not reason and any(args[i] is not x for i, x in self.held.items()):
            reason = "it was called with other parameters than it was captured with"
        if not reason:
            try:
                return self.compilation.run(tuple(given), {})
            except FuserError as error:
                reason = self.reason = str(error)
        if reason not in fallbacks:
            log.warning("a graph of torch.compile runs as it was captured: %s", reason)
            fallbacks.append(reason)
            del fallbacks[:-LAST]
        return self.module(*args)


def _is_static(item: Any) -> bool:
    """Whether an example input is a parameter or buffer of the module that dynamo captured."""
    return isinstance(item, nn.Parameter) or (
        isinstance(item, Tensor) and getattr(item, "_dynamo_static_input_type", None) is not None
    )


def _wants_gradient(item: Any) -> bool:
    return isinstance(item, Tensor) and item.requires_grad
