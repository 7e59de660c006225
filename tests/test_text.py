"""Text as it grows: whole characters, and what could become a stop text is held back."""

import random

import pytest

from fuser.runtime.text import Growing


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8; one above 255 is a word after a space, which a text's first word lacks."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        parts = [bytes([t]) if t < 256 else f" w{t}".encode() for t in token_ids]
        text = b"".join(parts).decode(errors="replace")
        return text.removeprefix(" ") if token_ids and token_ids[0] >= 256 else text


def grown(tokens: list[int], stops: tuple[str, ...] = (), prompt: str = "x") -> tuple[list[str], Growing]:
    growing = Growing(Bytes(), Bytes().encode(prompt), stops)
    found = []
    for i, token in enumerate(tokens):
        growing.add(token)
        found.append(growing.taken(is_last=growing.is_stopped or i == len(tokens) - 1))
        if growing.is_stopped:
            break
    return found, growing


def test_characters_come_whole() -> None:
    found, _ = grown(Bytes().encode("aé€😀b"))
    assert found == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_what_is_left_of_a_character_comes_last() -> None:
    found, _ = grown([97, 0xE2, 0x82])
    assert "".join(found) == "a\ufffd"


def test_a_word_keeps_its_space() -> None:
    found, _ = grown([300, 301])
    assert "".join(found) == " w300 w301"


def test_a_stop_text_is_cut_off_and_never_shown() -> None:
    found, growing = grown(Bytes().encode("one END two"), ("END",))
    assert "".join(found) == "one "
    assert growing.is_stopped
    assert grown(Bytes().encode("one EN"), ("END",))[0][-2:] == ["", "EN"]  # it did not come


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_and_stops(seed: int) -> None:
    drawn = random.Random(seed)
    for _ in range(50):
        text = "".join(drawn.choice("abé") for _ in range(drawn.randint(1, 20)))
        stops = tuple(
            "".join(drawn.choice("abé") for _ in range(drawn.randint(1, 3))) for _ in range(drawn.randint(0, 2))
        )
        found, growing = grown(Bytes().encode(text), stops)
        ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
        whole = text[: min(ends)] if ends else text
        begins = [place for stop in stops if (place := whole.find(stop)) >= 0]
        assert "".join(found) == (whole[: min(begins)] if begins else whole)
        assert growing.is_stopped == bool(ends)
