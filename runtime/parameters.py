"""How tokens are chosen: the parameters of one request, with the names and meanings of transformers where it has them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fuser.errors import UsageError

MOST_LOGPROBS = 256


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen, and when it ends.

    Attributes:
        max_new_tokens: the most tokens of a sample.
        min_new_tokens: until then no token that ends it is chosen.
        temperature: 0 takes the likeliest token.
        top_k: only so many likeliest tokens are drawn from; 0: all.
        top_p: only the likeliest tokens whose probabilities come to this.
        min_p: only tokens that are at least this times as likely as the likeliest.
        repetition_penalty: divides positive logits of tokens of prompt and output, and multiplies negative ones.
        presence_penalty: subtracted from the logits of tokens of the output.
        frequency_penalty: likewise, times how often they are there (OpenAI's definitions, both).
        seed: of what is drawn, of sample i the seed plus i; None: another one for each request.
        stop: texts, or token ids, that end a sample. A text is cut off, a token is the last one.
        ignore_eos: go on after the model's own tokens of the end.
        logprobs: give the log-probability of each token, and of so many likeliest ones; None: give none.
        n: how many samples of the prompt.

    Raises:
        UsageError: one of them cannot be.
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
    stop_strings: tuple[str, ...] = field(init=False, repr=False)
    stop_tokens: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._whole("max_new_tokens", 1)
        self._whole("min_new_tokens", 0, self.max_new_tokens)
        self._whole("top_k", 0)
        self._whole("n", 1)
        if self.logprobs is not None:
            self._whole("logprobs", 0, MOST_LOGPROBS)
        if self.seed is not None:
            self._whole("seed", None)
        self._number("temperature", "a number of 0 or more", lambda x: x >= 0)
        self._number("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1)
        self._number("min_p", "from 0 to 1", lambda x: 0 <= x <= 1)
        self._number("repetition_penalty", "above 0", lambda x: x > 0)
        self._number("presence_penalty", "a number", lambda x: True)
        self._number("frequency_penalty", "a number", lambda x: True)
        stop = (self.stop,) if isinstance(self.stop, (str, int)) else tuple(self.stop)
        for item in stop:
            if isinstance(item, bool) or not (
                (isinstance(item, str) and item) or (isinstance(item, int) and item >= 0)
            ):
                raise UsageError(f"stop must be texts, not empty, or token ids, got {item!r}")
        object.__setattr__(self, "stop_strings", tuple(item for item in stop if isinstance(item, str)))
        object.__setattr__(self, "stop_tokens", tuple(item for item in stop if not isinstance(item, str)))

    def _whole(self, name: str, least: int | None, most: int | None = None) -> None:
        value = getattr(self, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or (least is not None and value < least) or (most is not None and value > most):
            span = "" if least is None else f" of {least} or more" if most is None else f" from {least} to {most}"
            raise UsageError(f"{name} must be a whole number{span}, got {value!r}")

    def _number(self, name: str, wanted: str, fits: Any) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not fits(value):
            raise UsageError(f"{name} must be {wanted}, got {value!r}")

    @classmethod
    def of(cls, config: Any, prompt: int) -> "SamplingParams":
        """What a GenerationConfig of transformers asks for, for a prompt of so many tokens.

        Raises:
            UsageError: it asks for what is not done here, such as beams.
        """
        plain = type(config)()
        asked = {k: v for k, v in config.to_dict().items() if v is not None and v != getattr(plain, k, None)}
        sampled = bool(asked.get("do_sample", False))
        for name in asked.keys() & UNMET.keys():
            if asked[name] != UNMET[name]:
                raise UsageError(f"generation: {name}={asked[name]!r} is not done here")
        given: dict[str, Any] = {}
        if config.max_new_tokens is not None:
            given["max_new_tokens"] = config.max_new_tokens
        else:
            given["max_new_tokens"] = (config.max_length or 20) - prompt
        names = {"min_new_tokens": "min_new_tokens", "repetition_penalty": "repetition_penalty"}
        names |= {"num_return_sequences": "n"}
        if sampled:
            given["temperature"] = 1.0
            given["top_k"] = 50 if config.top_k is None else config.top_k  # what transformers takes by default
            names |= {name: name for name in ("temperature", "top_p", "min_p")}
        given |= {own: asked[name] for name, own in names.items() if name in asked}
        ends = asked.get("eos_token_id", ())
        stop = [*(asked.get("stop_strings") or ()), *(ends if isinstance(ends, (list, tuple)) else (ends,))]
        return cls(**given, stop=tuple(stop), ignore_eos="eos_token_id" in asked)  # its own take the model's place


# What transformers can be asked for and would change what is chosen, and the value that changes nothing.
UNMET: Mapping[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "top_h": None, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "bad_words_ids": None, "force_words_ids": None, "constraints": None,
    "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "guidance_scale": 1.0, "token_healing": False,
    "watermarking_config": None, "dola_layers": None, "min_length": 0, "max_time": None,
}  # fmt: skip
