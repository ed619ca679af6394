"""Thought and answer chunk by chunk: the same as of the whole text, wherever it is cut."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.text.chat import CHANNEL_END, THOUGHT, split_thought
from refimpl.text.thoughts import ThoughtSplitter

TEXTS = ["", "answer", f"{THOUGHT}thought\nwhy\n{CHANNEL_END}answer", f"{THOUGHT}thought\n{CHANNEL_END}answer\n",
         f"a {THOUGHT}thought\n one \n\n two {CHANNEL_END} b {THOUGHT}three", f"{THOUGHT}though", f"{THOUGHT}thoughtful{CHANNEL_END}",
         f"{THOUGHT} thought{CHANNEL_END}x", f"a{CHANNEL_END}b <|channel <channel| < end", f"{THOUGHT}a{THOUGHT}thought b{CHANNEL_END}c",
         f"{THOUGHT}{CHANNEL_END}{THOUGHT}thought\nx", f"<{THOUGHT}<{CHANNEL_END}<|", f"{THOUGHT}thought{THOUGHT}{CHANNEL_END}"]


def split(chunks) -> tuple[str, str]:
    splitter = ThoughtSplitter()
    pieces = [piece for chunk in chunks for piece in splitter.push(chunk)] + splitter.finish()
    assert all(text for _, text in pieces)
    return "".join(text for thought, text in pieces if thought), "".join(text for thought, text in pieces if not thought)


@pytest.mark.parametrize("text", TEXTS)
def test_every_cut_in_two_and_in_three_and_into_letters(text):
    wanted = split_thought(text)
    assert not any(marker in part for marker in (THOUGHT, CHANNEL_END) for part in wanted)
    assert split(text) == wanted
    for i, j in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        assert split([text[:i], text[i:j], text[j:]]) == wanted, (text[:i], text[i:j], text[j:])


@settings(deadline=None)
@given(st.lists(st.sampled_from([THOUGHT, CHANNEL_END, "thought", "th", "\n", " ", "a", "<", "<|chan", "nel>", "|>"]), max_size=12),
       st.lists(st.integers(1, 9), max_size=40))
def test_any_text_in_any_chunks(parts, lengths):
    text, chunks = "".join(parts), []
    rest = text
    for n in lengths:
        chunks.append(rest[:n])
        rest = rest[n:]
    assert split([*chunks, rest]) == split_thought(text)


def test_an_answer_is_not_held_back():
    """Only what may become a marker waits."""
    splitter = ThoughtSplitter()
    assert splitter.push("a < b") == [(False, "a < b")]
    assert splitter.push("x <|ch") == [(False, "x ")]
    assert splitter.push("eck") == [(False, "<|check")]
    assert splitter.push(f"{THOUGHT}thought\nso ") == [(True, "so")]
    assert splitter.push("far") == [(True, " far")]
