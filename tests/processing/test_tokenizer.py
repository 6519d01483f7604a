"""The tokenizer: the reference's ids, no special tokens out of a user's text, no half characters out of a stream."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3_format import SPECIALS, reference_ids, tokenizer, tokenizer_json

from openm3.processing import Tokenizer, TokenizerError
from openm3.processing.tokenizer import GUARD

texts = st.text() | st.lists(st.sampled_from([*SPECIALS, "]~b", "ai\n", "[e~", "~[", " ", "\n", "x", "é", "🙂"])).map(
    "".join
)


@given(texts)
def test_encoding_with_specials_equals_the_reference(text):
    assert tokenizer().encode(text, specials=True) == reference_ids(text)


@given(texts)
def test_text_is_encoded_without_specials_unless_asked(text):
    ids = tokenizer().encode(text)
    assert not set(ids) & set(tokenizer().specials.values())
    assert tokenizer().decode(ids) == text


@given(texts)
def test_decoding_gives_the_encoded_text_back(text):
    assert tokenizer().decode(tokenizer().encode(text, specials=True)) == text


@given(st.lists(texts, max_size=4))
def test_guarded_texts_hold_no_special_token_alone_or_joined(parts):
    guarded = [tokenizer().guard(part) for part in parts]
    assert tokenizer().split("".join(guarded)) == ["".join(guarded)]
    assert "".join(guarded).replace(GUARD, "") == "".join(parts)


def test_a_guarded_text_does_not_complete_or_spoil_the_templates_tokens():
    prompt = "]~b]user\n" + tokenizer().guard("[e~") + "[e~[" + tokenizer().guard("~b]") + "]~b]"
    assert tokenizer().split(prompt)[1::2] == ["]~b]", "[e~[", "]~b]"]
    overlapping = tokenizer().guard("]~b]~b]~b]")
    assert tokenizer().split(overlapping) == [overlapping]
    assert tokenizer().split("<" + tokenizer().guard("mm:think") + ">")[1::2] == []


def test_guarding_leaves_outer_white_space_to_the_template():
    assert tokenizer().guard("\n hi \n") == f"\n {GUARD}hi{GUARD} \n"
    assert tokenizer().guard(" \n") == " \n"
    assert tokenizer().guard("") == ""


def test_lone_surrogates_become_replacement_characters():
    assert tokenizer().decode(tokenizer().encode("a\ud83db")) == "a\ufffdb"
    assert GUARD not in tokenizer().guard("a\udc00b").strip(GUARD)


@given(st.lists(st.integers(0, 600), max_size=40))
def test_streaming_equals_decoding_at_once_and_never_shows_half_a_character(ids):
    decoder = tokenizer().stream()
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer().decode(ids)


@given(st.text(alphabet="é🙂日ab", min_size=1))
def test_a_stream_of_valid_text_has_no_replacement_characters(text):
    decoder = tokenizer().stream()
    ids = [i for byte in text.encode() for i in _id_of_byte(byte)]  # every byte a token of its own
    pieces = [decoder.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == list(text)
    assert decoder.flush() == ""


def _id_of_byte(byte: int) -> list[int]:
    return [i for i in range(tokenizer().vocab_size) if tokenizer().token_bytes(i) == bytes([byte])][:1]


def test_a_character_cut_off_comes_out_as_a_replacement_at_the_end():
    decoder = tokenizer().stream()
    assert [decoder.push(_id_of_byte(byte)[0]) for byte in "🙂".encode()[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd"


def test_streaming_time_grows_linearly():
    ids = tokenizer().encode("What is the weather in Paris? 🙂 " * 20) * 400
    start = time.perf_counter()
    decoder = tokenizer().stream()
    for token in ids:
        decoder.push(token)
    assert len(ids) > 50_000
    assert time.perf_counter() - start < 3


def test_an_unknown_special_token_is_one_clear_error():
    with pytest.raises(TokenizerError, match=r"unknown special token '\]<\]audio\[>\['") as error:
        tokenizer().special_id("]<]audio[>[")
    assert "\n" not in str(error.value)


def test_ids_without_a_token_decode_to_replacement_characters():
    assert tokenizer().decode([tokenizer().vocab_size + 5, -1]) == "\ufffd\ufffd"


@pytest.mark.parametrize(
    "spec",
    ["", "{", "[]", "{}", '{"model": {}}', '{"model": {"vocab": {}}}', json.dumps({"model": {"vocab": {"a": 0}}})],
)
def test_a_broken_tokenizer_file_is_one_clear_error(spec):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as error:
        Tokenizer(spec)
    assert "\n" not in str(error.value)


def test_missing_and_binary_files_are_clear_errors(tmp_path):
    with pytest.raises(TokenizerError, match="no such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_other_decoders_are_refused():
    raw = json.loads(tokenizer_json())
    raw["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    with pytest.raises(TokenizerError, match="byte-level BPE"):
        Tokenizer(json.dumps(raw))


@settings(max_examples=20)
@given(texts)
def test_a_tokenizer_survives_pickling(text):
    import pickle

    copy = pickle.loads(pickle.dumps(tokenizer()))
    assert copy.encode(text) == tokenizer().encode(text)
