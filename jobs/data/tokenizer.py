"""Byte-level BPE: any text becomes tokens and comes back byte for byte.

Text is always text: a document that spells "<|eos|>" gets ordinary tokens, because special tokens are put
in by their ids and never by their spelling.
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from cluster import storage

SPECIALS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
SMALLEST = 256 + len(SPECIALS)


def train(texts: Iterable[str], vocab: int):
    """A `tokenizers.Tokenizer` with the specials as ids 0..5, 256 bytes, and merges up to `vocab` entries.

    Fewer than `vocab` when the text has no more pairs to merge. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < SMALLEST:
        raise ValueError(f"vocab={vocab}: it has to be at least {SMALLEST} (256 bytes and {len(SPECIALS)} specials)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(place: str):
    """The tokenizer of a tokenizer.json at a path or URI."""
    return parse(storage.read(place).decode(), place)


def parse(text: str, place: str = "tokenizer.json"):
    """A tokenizer from its JSON, without truncation and padding. ValueError names `place`."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{place} is not a tokenizer.json of the `tokenizers` library ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special(tokenizer, token: str) -> int:
    """Id of a special token. ValueError lists those there are."""
    specials = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    if token not in specials:
        raise ValueError(f"the tokenizer has no special token {token!r}; it has {', '.join(specials) or 'none'}")
    return specials[token]


def size(tokenizer) -> int:
    """Classes a model needs: the highest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_batch(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, uint32, without any special token."""
    tokenizer.encode_special_tokens = True  # read their spellings as plain text
    found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(each.ids, dtype=np.uint32) for each in found]


def token_bytes(tokenizer):
    """(C) int64 tensor: how many UTF-8 bytes of text each token stands for; special tokens and unused ids 0.

    Over the ids of a text these sum to its length in bytes, which turns a loss per token into bits per byte.
    """
    import torch

    if "ByteLevel" not in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
        raise ValueError("token_bytes needs a byte-level tokenizer (one whose decoder is ByteLevel)")
    bytes_C = torch.zeros(size(tokenizer), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        bytes_C[index] = len(token)  # a byte-level token spells each byte as one character
    for index, token in tokenizer.get_added_tokens_decoder().items():
        bytes_C[index] = 0 if token.special else len(token.content.encode())
    return bytes_C
