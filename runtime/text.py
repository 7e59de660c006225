"""Text as it grows, token by token: whole characters only, and nothing that could still become a stop text."""

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What is used of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: list[int]) -> str: ...


class Growing:
    """The text of one sample. A few tokens before the new ones are decoded with them, since tokens join (spaces, bytes)."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens = list(prompt[-4:])
        self.begin, self.end = 0, len(self.tokens)  # tokens from `begin` are decoded again, those before `end` are told
        self.text = ""
        self.given = 0  # characters that were handed out
        self.is_stopped = False

    def add(self, token: int) -> None:
        """Takes one more token; `is_stopped` tells whether a stop text has come, which is cut off."""
        self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.begin : self.end])
        now = self.tokenizer.decode(self.tokens[self.begin :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return  # a part of a character
        start = len(self.text)
        self.text += now[len(before) :]
        self.begin, self.end = self.end, len(self.tokens)
        reach = max(map(len, self.stops), default=1) - 1
        places = [place for stop in self.stops if (place := self.text.find(stop, max(start - reach, 0))) >= 0]
        if places:
            self.text, self.is_stopped = self.text[: min(places)], True

    def taken(self, *, is_last: bool) -> str:
        """What can be handed out by now; at the end, all of it."""
        if is_last and not self.is_stopped:
            before, now = (self.tokenizer.decode(self.tokens[self.begin : end]) for end in (self.end, len(self.tokens)))
            self.text += now[len(before) :]
            self.begin = self.end = len(self.tokens)
        stop = len(self.text)
        if not is_last and self.stops:
            longest = max(map(len, self.stops)) - 1
            held = next(
                (
                    n
                    for n in range(min(longest, stop), 0, -1)
                    if any(s.startswith(self.text[stop - n :]) for s in self.stops)
                ),
                0,
            )
            stop -= held
        found, self.given = self.text[self.given : max(stop, self.given)], max(stop, self.given)
        return found
