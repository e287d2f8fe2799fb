"""Streaming shows what the whole text would: no half characters, no stop text, nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models

from serve.text import TextStream

LETTERS = st.text(st.sampled_from("ab\u00fc\u4f60\U0001f600 \ufffd"), max_size=30)


def stream(tokenizer, tokens, stop=()) -> tuple[list[str], TextStream]:
    text = TextStream(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.close()], text


def letters(tokenizer, text: str) -> list[int]:
    """Tokens of single bytes: the most split there is."""
    from tokenizers import pre_tokenizers

    parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [tokenizer.token_to_id(letter) for word, _ in parts for letter in word]


@settings(max_examples=100, deadline=None)
@given(text=LETTERS)
def test_characters_come_whole(tokenizer, text):
    tokens = letters(tokenizer, text)
    pieces, _ = stream(tokenizer, tokens)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) >= len(text) - text.count("\ufffd") - 1


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 299), max_size=60))
def test_any_tokens_add_up_to_their_text(tokenizer, tokens):
    """Also bytes that are no characters."""
    tokens = [token % tokenizer.get_vocab_size() for token in tokens]
    assert "".join(stream(tokenizer, tokens)[0]) == tokenizer.decode(tokens)


def cut(text: str, stop: list[str]) -> str:
    """Letter by letter: the first stop text that is complete ends it."""
    for end in range(len(text) + 1):
        for word in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(word):
                return text[: end - len(word)]
    return text


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    whole=st.booleans(),
)
def test_stop_texts_are_never_shown(tokenizer, text, stop, whole):
    tokens = tokenizer.encode(text).ids if whole else letters(tokenizer, text)
    pieces, state = stream(tokenizer, tokens, stop)
    assert "".join(pieces) == cut(text, stop)
    assert state.stopped == any(word in text for word in stop)


def test_what_might_begin_a_stop_text_waits_and_comes_when_it_does_not():
    class Letters:
        decode = staticmethod(lambda tokens: "".join(map(chr, tokens)))

    text = TextStream(Letters(), ["END."])
    assert [text.push(ord(letter)) for letter in "xENEND?"] == ["x", "", "", "EN", "", "", "END?"]
    text = TextStream(Letters(), ["END.", "ND"])
    assert [text.push(ord(letter)) for letter in "xEND"] == ["x", "", "", "E"]
    assert text.stopped and text.close() == ""


@pytest.mark.parametrize("text", ["a \u4f60\u597d b", "\U0001f600\U0001f600"])
def test_decoders_that_fall_back_to_bytes_and_mark_words(text):
    """The other common kind: '_word' pieces, and <0x..> for what has no token; the first space is dropped."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581a": 256, "\u2581": 257, "\u2581b": 258}
    tokenizer = Tokenizer(token_models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = []
    for letter in text:
        tokens += {"a": [256], " ": [257], "b": [258]}.get(letter) or list(letter.encode())
    tokens *= 12
    pieces, _ = stream(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) and not any("\ufffd" in piece for piece in pieces)
