"""Scores of texts, which are the same whatever else runs."""

from pathlib import Path

import pytest

from fuser.llm import LLM
from fuser.runtime.parameters import SamplingParams

DEMO = Path(__file__).resolve().parents[1] / "models/demo/model.onnx"


def test_preempted_scores_are_told_once() -> None:
    """An older request takes the pages of one that is half scored."""
    text = [(7 * i * i + 3 * i) % 200 + 1 for i in range(40)]
    llm = LLM(DEMO, page_size=4, max_sequences=2, max_step_tokens=8, max_tokens_in_flight=64, max_length=64)
    (wanted,) = llm.score([text])
    llm.add_request(text[:9], SamplingParams(max_new_tokens=50, ignore_eos=True))
    (found,) = llm.score([text])
    assert llm.engine.scheduler.preemptions
    assert len(found.logprobs) == len(text) - 1
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


def test_nothing_is_told_of_what_was_cancelled() -> None:
    """Its last step may still be on its way."""
    engine = LLM(DEMO, page_size=4, max_sequences=2, max_step_tokens=8, max_tokens_in_flight=64, max_length=64).engine
    sequence = engine.add("score", [5, 6, 7], SamplingParams(), seed=0, scored=True)
    engine._flight = engine._launch(engine.scheduler.schedule())
    engine.finish(sequence, "cancelled")
    assert engine.step() == [] and engine.is_idle
