"""jobs/data/tokenizer.py: any text comes back exactly; specials are never made from text; bytes add up."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data import Data, tokenizer
from jobs.data.documents import documents

TEXTS = [d.text for d in documents(Data(limit_bytes=200_000))]
SMALL = tokenizer.train(TEXTS, 600)
BYTES_C = tokenizer.token_bytes(SMALL)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip_and_byte_count(text):
    (ids,) = tokenizer.encode_batch(SMALL, [text])
    assert SMALL.decode(ids.tolist(), skip_special_tokens=False) == text
    assert int(BYTES_C[ids.astype("int64")].sum()) == len(text.encode())


@pytest.mark.parametrize(
    "text", ["<|eos|>", "a<|bos|>b<|user|>", " <|end|> ", "\0", "\r\n\t ", "\U0001f9d1\u200d\U0001f680"]
)
def test_spelled_specials_and_odd_characters_are_text(text):
    (ids,) = tokenizer.encode_batch(SMALL, [text])
    assert min(ids) >= len(tokenizer.SPECIALS)
    assert SMALL.decode(ids.tolist(), skip_special_tokens=False) == text
    assert int(BYTES_C[ids.astype("int64")].sum()) == len(text.encode())


def test_specials_come_first_and_stand_for_no_bytes():
    assert [tokenizer.special(SMALL, token) for token in tokenizer.SPECIALS] == list(range(6))
    assert BYTES_C[:6].tolist() == [0] * 6 and BYTES_C[6:].min() == 1
    assert tokenizer.size(SMALL) == 600 and len(BYTES_C) == 600
    with pytest.raises(ValueError, match=r"no special token '<pad>'; it has <\|bos\|>, <\|eos\|>"):
        tokenizer.special(SMALL, "<pad>")


def test_training_is_deterministic_and_saves(tmp_path):
    assert tokenizer.train(TEXTS, 600).to_str() == SMALL.to_str()
    SMALL.save(str(tmp_path / "tokenizer.json"))
    again = tokenizer.load(str(tmp_path / "tokenizer.json"))
    for a, b in zip(tokenizer.encode_batch(again, TEXTS), tokenizer.encode_batch(SMALL, TEXTS), strict=True):
        assert (a == b).all()


def test_smallest_vocab_is_bytes_alone():
    smallest = tokenizer.train(TEXTS, tokenizer.SMALLEST)
    (ids,) = tokenizer.encode_batch(smallest, ["h\u00e9llo"])
    assert len(ids) == 6 and tokenizer.size(smallest) == tokenizer.SMALLEST
    with pytest.raises(ValueError, match="vocab=261: it has to be at least 262"):
        tokenizer.train(TEXTS, 261)


def test_added_plain_tokens_count_their_bytes():
    extended = tokenizer.parse(SMALL.to_str())
    extended.add_tokens(["\u00e9\u00e9\u00e9"])
    (ids,) = tokenizer.encode_batch(extended, ["x\u00e9\u00e9\u00e9"])
    assert int(tokenizer.token_bytes(extended)[ids.astype("int64")].sum()) == 7


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json is not a tokenizer\.json"):
        tokenizer.load(str(tmp_path / "t.json"))
    words = json.loads(SMALL.to_str()) | {"decoder": None}
    with pytest.raises(ValueError, match="needs a byte-level tokenizer"):
        tokenizer.token_bytes(tokenizer.parse(json.dumps(words)))
