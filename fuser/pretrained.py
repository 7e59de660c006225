"""Models of Hugging Face transformers, compiled without example inputs: decoders with and without a cache, encoders.

A decoder becomes one graph of `(input_ids [B, S], attention_mask [B, T], position_ids [B, S], past keys and values
[B, G, P, Dh]) -> (logits [B, S, V], present keys and values [B, G, T, Dh])`, which serves every call: a prompt has no past.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim

from fuser.checking import relative_error
from fuser.compilation import Compilation, Linked, compared, linked
from fuser.errors import InputError, UnsupportedOperator
from fuser.fx import evaluating, export_module
from fuser.pipeline import stage
from fuser.report import Report
from fuser.runtime.executor import Executor

# (B, S, P, padding on the left of the first sequence)
STEPS = {"decode": (1, 1, 9, 0), "prefill": (1, 7, 0, 0), "chunk": (1, 3, 5, 0), "padded": (2, 3, 5, 2)}
# Of the ways in which transformers computes experts, the one without loops over what a router chose or kernels of its own.
EXPERTS = "batched_mm"
TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers that takes tokens."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return False
    return "input_ids" in inspect.signature(module.forward).parameters


Count: TypeAlias = Callable[[Tensor, int], Tensor]


class Decoder(nn.Module):
    """A decoder as a function of tensors alone: tokens, mask, positions if it takes them, then keys and values by layer."""

    def __init__(self, model: Any, outputs: tuple[str, ...], *, positions: bool) -> None:
        super().__init__()
        self.model, self.outputs, self.positions = model, outputs, positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        past = others[1:] if self.positions else others
        # Made without a config, a layer with a window keeps all it has seen, and the mask alone says what it sees.
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        given = {"position_ids": others[0]} if self.positions else {}
        out = self.model(
            input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, return_dict=True, **given
        )
        states = (state for layer in cache.layers for state in (layer.keys, layer.values))
        return *(out[name] for name in self.outputs), *states


class Encoder(nn.Module):
    """An encoder as a function of tensors alone."""

    def __init__(self, model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self.inputs, tokens, strict=True)), return_dict=True)
        return tuple(out[name] for name in self.outputs)


def _run(made: Linked, *given: Tensor) -> list[Tensor]:
    return made.executor(*given)


class Uncompiled(Exception):
    """A call is of a form that is not compiled; the text says which."""


@dataclass
class Pretrained(Compilation):
    """The compiled graph of a model of transformers, and how its calls become calls of that graph."""

    fallbacks: dict[str, int] = field(default_factory=dict)  # calls that the module itself answered, by reason
    made: Linked | None = None

    @property
    def first(self) -> Linked:
        """The compiled model; compiled now, if it is not."""
        if self.made is None:
            self._watch()
            self._probe()
            self.made = self._captured()
        return self.made

    def forget(self) -> None:
        self.made = None

    @property
    def model(self) -> Any:
        return self.module

    def _probe(self) -> None:
        """What the model takes and gives, as calls with three tokens show.

        Raises:
            UnsupportedOperator: it is an encoder with a decoder.
            InputError: it cannot be called with tokens alone.
        """
        parameters = self.signature.parameters
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise UnsupportedOperator(f"{type(self.module).__name__}: encoders with a decoder are not compiled yet")
        cached = {"use_cache": True} if "past_key_values" in parameters else {}
        ids = torch.ones(2, 3, dtype=torch.int64, device=self.device)
        out = self._called(input_ids=ids, **cached)
        self.kind = type(out)
        self.gives = tuple(name for name, value in out.items() if isinstance(value, Tensor))
        layers = getattr(getattr(out, "past_key_values", None), "layers", ())
        self.is_decoder = bool(layers) and all(hasattr(layer, "keys") for layer in layers)
        neutral = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        # What is left out is given to the graph as what changes nothing; where that changes something, it is not compiled.
        names = [name for name in TOKENS[1 : 2 if self.is_decoder else 3] if name in parameters]
        self.takes = ("input_ids", *(n for n in names if self._agree(out, input_ids=ids, **{n: neutral[n]})))
        if self.is_decoder:
            states = [state for layer in layers for state in (layer.keys, layer.values)]
            self.states = [(state.shape[1], state.shape[3], state.dtype) for state in states]
            self.positions = "position_ids" in parameters
            self.count = self._count(ids) if self.positions else None

    def _called(self, **given: Any) -> Any:
        try:
            with evaluating(self.module):
                return self.module(**given, return_dict=True)
        except Exception as error:  # whatever a model raises
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{type(self.module).__name__} cannot be called with {', '.join(given)} alone, give example_inputs: {told}"
            ) from error

    def _agree(self, out: Any, **given: Any) -> bool:
        """Whether the model gives the same with some arguments."""
        if self.device.type == "meta":
            return True  # there are no numbers to tell by
        other = self._called(**given)
        return all(relative_error(other[name], out[name]) <= 1e-2 for name in self.gives)

    def _count(self, ids: Tensor) -> Count | None:
        """How the model counts the positions that it is not given, on a sequence that is padded; None: in another way."""
        if self.device.type == "meta":
            return _in_a_row
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        out = self._called(input_ids=ids, attention_mask=mask)
        for count in (_in_a_row, _by_mask, _by_mask_alone):
            if self._agree(out, input_ids=ids, attention_mask=mask, position_ids=count(mask, 0)):
                return count
        return None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _captured(self) -> Linked:
        report = Report(type(self.module).__name__, self.options.backend)
        example = tuple(self._drawn(2, 3, 5 if self.is_decoder else 0, 1))
        batch = Dim("batch")
        tokens = {0: batch, 1: Dim.AUTO}  # the total is past and sequence: one of them follows, which is torch's to say
        flat: nn.Module
        if self.is_decoder:
            flat = Decoder(self.module, self.gives, positions=self.positions)
            past = [{0: batch, 2: Dim("past")}] * len(self.states)
            others = tuple(([tokens] if self.positions else []) + past)
            shapes: Any = {"input_ids": tokens, "attention_mask": tokens, "others": others}
            layers = [f"{i // 2}.{'value' if i % 2 else 'key'}" for i in range(len(self.states))]
            inputs = [*TOKENS[:2], *(["position_ids"] if self.positions else [])]
            inputs += [f"past_key_values.{layer}" for layer in layers]
            outputs = [*self.gives, *(f"present.{layer}" for layer in layers)]
        else:
            flat = Encoder(self.module, self.takes, self.gives)
            inputs, outputs = list(self.takes), list(self.gives)
            shapes = {"tokens": (tokens,) * len(self.takes)}

        def linked_as(experts: str | None) -> Linked:
            with self._experts(experts), stage(report, "export", self.options.note):
                program = export_module(flat, example, {}, shapes)
            made = linked(program, report, self.options, inputs=inputs, outputs=outputs)
            if any(isinstance(dim, int) for dim in made.graph.inputs[0].shape or ()):
                raise UnsupportedOperator(
                    f"{type(self.module).__name__} fixes how many tokens it takes when it is captured"
                )
            return made

        try:
            made = linked_as(None)
        except InputError:
            if not self._has_experts():
                raise
            made = linked_as(EXPERTS)
        if self.options.verify:
            with stage(report, "verify", self.options.note):
                drawn = {name: tuple(self._drawn(*step)) for name, step in self._steps().items()}
                cases = {name: (partial(flat, *given), partial(_run, made, *given)) for name, given in drawn.items()}
                report.verification = compared(self.module, made, cases)
        return made

    def _has_experts(self) -> bool:
        """Whether the model computes experts, in a way of several that can be chosen."""
        if not hasattr(self.model, "get_experts_implementation") or not self.model._can_set_experts_implementation():
            return False
        return set(self.model.get_experts_implementation().values()) != {EXPERTS}

    @contextmanager
    def _experts(self, implementation: str | None) -> Iterator[None]:
        """The model with its experts computed in a given way, and afterwards as they were."""
        if implementation is None:
            yield
            return
        before = self.model.get_experts_implementation()
        self.model.set_experts_implementation(implementation)
        try:
            yield
        finally:
            self.model.set_experts_implementation(before)

    def _steps(self) -> Mapping[str, tuple[int, int, int, int]]:
        if self.is_decoder:
            return STEPS
        return {"sequence": (1, 7, 0, 0), "padded": (2, 5, 0, 2)}

    def _drawn(self, B: int, S: int, P: int, padding: int) -> list[Tensor]:
        """Random inputs of the graph, of one size."""
        random = torch.Generator().manual_seed(B + S + P)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(0, vocabulary, (B, S), generator=random).to(self.device)
        mask = torch.ones(B, P + S, dtype=torch.int64, device=self.device)
        if not self.is_decoder:
            if padding:
                mask[-1, -padding:] = 0
            types = torch.randint(0, getattr(self.model.config, "type_vocab_size", 1), (B, S), generator=random)
            given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types.to(self.device)}
            return [given[name] for name in self.takes]
        mask[0, :padding] = 0
        positions = [_by_mask(mask, P)] if self.positions else []
        past = [
            torch.randn(B, heads, P, width, generator=random).to(self.device, dtype)
            for heads, width, dtype in self.states
        ]
        return [ids, mask, *positions, *past]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns; by the model itself, where the call is of a form that is not compiled."""
        self._follow()
        executor = self.first.executor
        try:
            given = self._given(args, kwargs)
            return self._decoded(given, executor) if self.is_decoder else self._encoded(given, executor)
        except Uncompiled as reason:
            text = str(reason)
            if text not in self.fallbacks:
                warnings.warn(f"fuser: {type(self.module).__name__} runs uncompiled: {text}", stacklevel=4)
            self.fallbacks[text] = self.fallbacks.get(text, 0) + 1
            return self.module(*args, **kwargs)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that say something, by name.

        Raises:
            Uncompiled: one of them asks for what the graph does not give.
        """
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"{type(self.module).__name__}.forward: {error}") from None
        given = {}
        for name, value in bound.items():
            if self.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            else:
                given[name] = value
        known = {*self.takes, "return_dict"}
        if self.is_decoder:
            known |= {"position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
        asked = [
            name for name, value in given.items() if name not in known and value is not None and value is not False
        ]
        if asked:
            raise Uncompiled(f"it was called with {', '.join(asked)}")
        if given.get("input_ids") is None:
            raise Uncompiled("it was called without input_ids")
        return given

    def _encoded(self, given: Mapping[str, Any], executor: Executor) -> Any:
        ids = given["input_ids"]
        neutral = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        found = [given.get(name) for name in self.takes]
        made = executor(*(neutral[n] if x is None else x for n, x in zip(self.takes, found, strict=True)))
        return self._result(given, dict(zip(self.gives, made, strict=True)))

    def _decoded(self, given: Mapping[str, Any], executor: Executor) -> Any:
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        ids = given["input_ids"]
        B, S = ids.shape
        use_cache = given.get("use_cache")
        use_cache = self.model.config.use_cache if use_cache is None else use_cache
        cache = given.get("past_key_values")
        if cache is None and use_cache:
            cache = DynamicCache(config=self.model.config)
        as_they_are = (DynamicLayer, DynamicSlidingWindowLayer)  # layers that hold keys and values so
        kinds = {type(layer) for layer in getattr(cache, "layers", ())}
        others = {kind.__name__ for kind in kinds.difference(as_they_are)}
        if others or not (cache is None or hasattr(cache, "layers")):
            raise Uncompiled(
                f"its cache is a {type(cache).__name__}" + "".join(f" of {kind}" for kind in sorted(others))
            )
        P = 0 if cache is None else cache.get_seq_length()
        mask = given.get("attention_mask")
        if mask is None:
            mask = torch.ones(B, P + S, dtype=torch.int64, device=ids.device)
        elif not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != P + S:
            raise Uncompiled("its attention_mask is not [batch, past + sequence]")
        inputs = [ids, mask.to(torch.int64)]
        if self.positions:
            positions = given.get("position_ids")
            if positions is None:
                if self.count is None:
                    raise Uncompiled("it was called without position_ids")
                positions = self.count(inputs[1], P)
            inputs.append(positions.expand(B, S))
        made = executor(*inputs, *self._past(cache, B, P))
        fields = dict(zip(self.gives, made, strict=False))
        kept = given.get("logits_to_keep")
        if kept is not None:
            fields["logits"] = fields["logits"][:, slice(-kept, None) if isinstance(kept, int) else kept]
        if cache is not None:
            _write(cache, made[len(self.gives) :], P)
        return self._result(given, fields | {"past_key_values": cache})

    def _past(self, cache: Any, B: int, P: int) -> list[Tensor]:
        """The keys and values of P tokens before; those that a window no longer sees are zeros, which the mask hides."""
        if cache is None or not P:
            return [torch.zeros(B, H, 0, width, dtype=dtype, device=self.device) for H, width, dtype in self.states]
        found = []
        for layer in cache.layers:
            for state in (layer.keys, layer.values):
                missing = P - state.shape[2]
                found.append(nn.functional.pad(state, (0, 0, missing, 0)) if missing else state)
        return found

    def _result(self, given: Mapping[str, Any], fields: dict[str, Any]) -> Any:
        out = self.kind(**fields)
        asked = given.get("return_dict")
        return out if (self.model.config.return_dict if asked is None else asked) else out.to_tuple()


def _in_a_row(mask: Tensor, P: int) -> Tensor:
    """The positions of all tokens but the first P, padding counted."""
    return torch.arange(P, mask.shape[1], device=mask.device)[None]


def _by_mask(mask: Tensor, P: int) -> Tensor:
    """Likewise, of the tokens that are none of padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, P:]


def _by_mask_alone(mask: Tensor, P: int) -> Tensor:
    """Likewise, those of padding being -1."""
    return (mask.cumsum(1) * mask - 1)[:, P:]


def _write(cache: Any, present: list[Tensor], P: int) -> None:
    """Leaves a cache as the model would have left it."""
    for index, (keys, values) in enumerate(zip(present[::2], present[1::2], strict=True)):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or layer.is_sliding or not layer.is_initialized:
            cache.update(keys[:, :, P:], values[:, :, P:], index)
        else:
            layer.keys, layer.values = keys, values
