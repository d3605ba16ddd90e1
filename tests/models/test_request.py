"""Stop strings in text that comes in pieces, and drafts from text that repeats itself."""

import pytest

from aigc_fast.models.autoregressive.prompt_lookup import PromptLookup
from aigc_fast.models.autoregressive.request import StoppedText


def pieces(text, stop_strings, size=1):
    """What is shown after each piece of the text, and what at the end."""
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    stopped = StoppedText(lambda i: chunks[i], stop_strings)
    shown = []
    for i in range(len(chunks)):
        shown.append(stopped.add(i))
        if stopped.stopped:
            break
    return [*shown, stopped.rest()], stopped.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("ababac", ["abac"], "ab"),
        ("a\n\nb", ["\n\n"], "a"),
        ("ends with th", ["the"], "ends with th"),
        ("overlap", ["lap", "verlap"], "o"),
        ("anything", [], "anything"),
        ("stop", ["stop"], ""),
    ],
)
def test_text_goes_up_to_the_first_stop_string(text, stops, expected, size):
    shown, stopped = pieces(text, stops, size)
    assert "".join(shown) == expected
    assert stopped == (expected != text)


def test_only_what_may_begin_a_stop_string_waits():
    shown, _ = pieces("a<b<end", ["<end>"])
    assert shown == ["a", "", "<b", "", "", "", "", "<end"]


def test_drafts_are_what_followed_the_newest_tokens_before():
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2])
    assert lookup.draft(3) == [3, 4, 5]  # two tokens in a row
    lookup.extend([3])
    assert lookup.draft(2) == [4, 5]  # three, though 2, 3 came later once more
    assert lookup.draft(0) == []
    lookup.extend([8])
    assert lookup.draft(4) == []
    lookup.extend([8, 8, 8])
    assert lookup.draft(4) == [8]  # up to the end of the text


def test_no_drafts_of_short_texts():
    lookup = PromptLookup()
    assert lookup.draft(4) == []
    lookup.extend([1])
    assert lookup.draft(4) == []
