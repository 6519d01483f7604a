"""Text as it grows: a stop string is found at every split, and nothing of it is ever shown."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from openm3.engine.output import StopFinder, TextOutput


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool, list[str]]:
    """(the text that comes out, whether it was stopped, the text out after each piece)."""
    finder, out, after = StopFinder(stops), "", []
    for piece in pieces:
        text, stopped = finder.push(piece)
        out += text
        after.append(out)
        if stopped:
            return out, True, after
    return out + finder.flush(), False, after


def by_characters(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """The definition: the first prefix that ends with a stop string, without it (the longest, of several)."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stops if text[:end].endswith(s)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def splits(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


words = st.text("ab\n", max_size=12)
stop_words = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple)


@given(stop_words, words, st.lists(st.integers(0, 100), max_size=12))
@example(("abab", "b\n"), "aababab", [1, 2, 3, 4, 5, 6])
def test_every_split_gives_what_the_definition_says(stops, text, cuts):
    out, stopped, after = run(stops, splits(text, cuts))
    assert (out, stopped) == by_characters(stops, text)
    assert all(out.startswith(shown) for shown in after)


def test_only_what_may_become_a_stop_string_is_held_back():
    finder = StopFinder(("END", "\n\n"))
    assert finder.push("some text E") == ("some text ", False)
    assert finder.push("N") == ("", False)
    assert finder.push("T\n") == ("ENT", False)
    assert finder.push("x") == ("\nx", False)
    assert finder.push("EN") == ("", False)
    assert finder.push("D and more") == ("", True)


class Letters:
    """A decoder of one letter a token that holds back one letter, as byte-level decoders hold back half characters."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token: int) -> str:
        out, self.held = self.held, chr(token)
        return out

    def flush(self) -> str:
        out, self.held = self.held, ""
        return out


def test_a_stop_string_that_the_decoder_completes_at_the_end_counts():
    output = TextOutput(Letters(), ("cd",))
    assert not any(output.push(ord(c)) for c in "abcd")
    assert output.finish()
    assert output.take() == "ab"


def test_without_a_stop_everything_comes_out_at_the_end():
    output = TextOutput(Letters(), ("cde",))
    pieces = []
    for c in "abcd":
        output.push(ord(c))
        pieces.append(output.take())
    assert not output.finish()
    pieces.append(output.take())
    assert "".join(pieces) == "abcd"
    assert pieces == ["", "a", "b", "", "cd"]
