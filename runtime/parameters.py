"""How the tokens of a request are chosen, and when it ends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Self

from fuser.errors import UsageError

MOST_LOGPROBS = 256


LARGEST = 3.4e38  # of float32, which logits are computed in


def _whole(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and least <= int(value) <= most


def _real(value: Any, least: float = -LARGEST, most: float = LARGEST) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and bool(least <= value <= most)  # type: ignore[operator]


WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("a whole number of at least 1", lambda value: _whole(value, 1)),
    "min_new_tokens": ("a whole number of at least 0", lambda value: _whole(value, 0)),
    "temperature": ("a finite number of at least 0", lambda value: _real(value, 0)),
    "top_k": ("a whole number of at least 0", lambda value: _whole(value, 0)),
    "top_p": ("a number above 0 and at most 1", lambda value: _real(value, 0, 1) and value > 0),
    "min_p": ("a number from 0 to 1", lambda value: _real(value, 0, 1)),
    "repetition_penalty": ("a finite number above 0", lambda value: _real(value, 0) and value > 0),
    "presence_penalty": ("a finite number", _real),
    "frequency_penalty": ("a finite number", _real),
    "seed": ("a whole number or None", lambda value: value is None or _whole(value)),
    "ignore_eos": ("True or False", lambda value: isinstance(value, bool)),
    "logprobs": (
        f"None or a whole number from 0 to {MOST_LOGPROBS}",
        lambda value: value is None or _whole(value, 0, MOST_LOGPROBS),
    ),
    "n": ("a whole number of at least 1", lambda value: _whole(value, 1)),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How many tokens a request gets, how each is chosen, and what ends it before.

    Names and meaning are those of transformers' `GenerationConfig` where it has them, those of OpenAI's interface elsewhere.

    Attributes:
        max_new_tokens: the most tokens that are generated.
        min_new_tokens: until there are so many, no token that would end the request is chosen.
        temperature: what logits are divided by; 0 chooses the likeliest token (greedy), and nothing is drawn.
        top_k: the number of likeliest tokens that are drawn from; 0 for all.
        top_p: the probability that the tokens drawn from have together, the likeliest first.
        min_p: the least probability of a token that is drawn from, as a part of the likeliest one's.
        repetition_penalty: what positive logits of tokens of prompt and output are divided by, and negative ones multiplied.
        presence_penalty: what is subtracted from the logits of tokens that are in the output.
        frequency_penalty: what is subtracted from them for each time they are in the output.
        seed: what draws are made from, the same tokens for the same seed; None for a fresh one each time.
        stop: strings or token ids that end the output, one or several of either; a tuple after construction.
        ignore_eos: whether the model's end token is a token like others.
        logprobs: for the logarithm of each chosen token's probability, and of so many of the likeliest; None for none.
        n: the number of outputs.

    Raises:
        UsageError: a value is none of these; the text names it, what was expected and what was given.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | int | Sequence[str | int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, (wanted, holds) in WANTED.items():
            if not holds(value := getattr(self, name)):
                raise UsageError(f"{name} must be {wanted}, got {value!r}")
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens must be at most max_new_tokens, {self.max_new_tokens}, got {self.min_new_tokens}"
            )
        stop = (self.stop,) if isinstance(self.stop, (str, Integral)) else self.stop
        if not isinstance(stop, Sequence) or isinstance(stop, (bytes, bytearray)):
            raise UsageError(f"stop must be strings or token ids, got {stop!r}")
        for one in stop:
            if not (one if isinstance(one, str) else _whole(one, 0)):
                raise UsageError(f"stop must be strings that are not empty, or token ids of at least 0, got {one!r}")
        object.__setattr__(self, "stop", tuple(stop))

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of `stop`."""
        return tuple(one for one in _listed(self.stop) if isinstance(one, str))

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The token ids of `stop`."""
        return tuple(int(one) for one in _listed(self.stop) if not isinstance(one, str))

    @classmethod
    def of(cls, config: Any, prompt_length: int) -> Self:
        """What a transformers `GenerationConfig` says, for a prompt of `prompt_length` tokens.

        What is not set means what `generate` makes of it: 20 tokens, each the likeliest or, with `do_sample`, drawn among 50.
        Fields that change neither tokens nor their number (of caches, of what is returned) say nothing here, nor do those that
        transformers does not know; end tokens become `stop` tokens.

        Raises:
            UsageError: it asks for what is not done here (beams, other filters); the text names the field.
        """
        defaults = vars(type(config)())
        sampled = bool(getattr(config, "do_sample", None))
        for name, value in vars(config).items():
            if name in TAKEN or name in APART or name.startswith("_") or value is None:
                continue
            if name not in NEUTRAL and name not in defaults:
                continue  # not a field of transformers: `generate` does not know it either
            if value != NEUTRAL.get(name, defaults.get(name)) and (sampled or name not in FILTERS):
                raise UsageError(f"{name} is not supported in generation, and the configuration sets it to {value!r}")

        def given(name: str, default: Any) -> Any:
            value = getattr(config, name, None)
            return default if value is None else value

        length = getattr(config, "max_length", None)
        if length is None or length == defaults.get("max_length"):
            length = prompt_length + 20
        new = getattr(config, "max_new_tokens", None)
        if new is None and length <= prompt_length:
            raise UsageError(
                f"max_length must be more than the prompt's {prompt_length} tokens, got {length}; max_new_tokens counts without"
            )
        drawn: dict[str, Any] = {}
        if sampled:
            drawn = {
                "temperature": given("temperature", 1.0),
                "top_k": given("top_k", 50),
                "top_p": given("top_p", 1.0),
                "min_p": given("min_p", 0.0),
            }
        return cls(
            max_new_tokens=length - prompt_length if new is None else new,
            min_new_tokens=given("min_new_tokens", max(0, given("min_length", 0) - prompt_length)),
            repetition_penalty=given("repetition_penalty", 1.0),
            stop=(*_listed(getattr(config, "stop_strings", None)), *_listed(getattr(config, "eos_token_id", None))),
            n=given("num_return_sequences", 1),
            ignore_eos=getattr(config, "eos_token_id", None) is not None,  # its own end tokens take the model's place
            **drawn,
        )


def _listed(values: Any) -> Sequence[Any]:
    """One value, several (a tensor of them, too) or None, as a sequence."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if values is None:
        return ()
    return values if isinstance(values, (list, tuple)) else (values,)


# fmt: off
# Fields of GenerationConfig: those that are taken over,
TAKEN = frozenset((
    "do_sample", "max_new_tokens", "max_length", "min_new_tokens", "min_length", "temperature", "top_k", "top_p",
    "min_p", "repetition_penalty", "num_return_sequences", "stop_strings", "eos_token_id",
))
# those that change no token, or only those of beams and of assistants, which are refused,
APART = frozenset((
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
    "disable_compile", "low_memory", "continuous_batching_config", "return_dict_in_generate", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "renormalize_logits", "early_stopping",
    "length_penalty", "num_beam_groups", "diversity_penalty", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "max_matching_ngram_size",
))
# fmt: on
# and the values with which the others do nothing: without a line here, None and what a new GenerationConfig holds.
NEUTRAL = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "remove_invalid_values": False,
    "token_healing": False,
    "use_mtp": False,
}
FILTERS = frozenset(("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"))  # of draws alone
