"""One Llama of random weights and a byte-level tokenizer, in the folder of each engine that is measured."""

import json
from pathlib import Path

SHAPE = {"vocab": 32000, "dim": 640, "layers": 12, "heads": 10, "kv_heads": 5, "hidden": 1920}
SMALL = {"vocab": 512, "dim": 128, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 384}
LETTERS = "etaoinshrdlucmfwypvbgkqjxzETAOINSHRDLUCMFWYPVBGKQJXZ"


def write(folder: Path, shape: dict[str, int]) -> int:
    """`folder`/edifice and `folder`/hf, of the same weights; the number of parameters."""
    import torch

    from models import build, hub

    torch.manual_seed(0)
    heads = f"gqa(heads={shape['heads']},kv_heads={shape['kv_heads']},head_dim={shape['dim'] // shape['heads']})"
    model = build(
        "decoder", vocab=shape["vocab"], dim=shape["dim"], layers=shape["layers"], pattern=heads,
        ffn=f"swiglu(hidden={shape['hidden']})", tied=True,
    )  # fmt: skip
    spelled = tokenizer(shape["vocab"])
    hub.save(model, str(folder / "edifice"), spelled.encode())
    hub.save_hf(model, str(folder / "hf"), "llama")
    (folder / "hf" / "tokenizer.json").write_text(spelled)
    return sum(parameter.numel() for parameter in model.parameters())


def vocabulary(folder: Path) -> int:
    return json.loads((folder / "hf" / "config.json").read_text())["vocab_size"]


def tokenizer(vocab: int) -> str:
    """A tokenizer.json with so many tokens: the bytes, then pairs and triples of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in LETTERS for b in LETTERS]
    merges += [(a + b, c) for a in LETTERS for b in LETTERS for c in LETTERS]
    merges = merges[: vocab - len(known)]
    tokens = {token: id for id, token in enumerate([*known, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made.to_str()


def prompts(rows: int, length: int, vocab: int, draw: int) -> list[list[int]]:
    """Prompts that differ from their first token on, in every draw: no cache has them."""
    return [
        [(1 + 7919 * (row + 64 * draw) + 31 * i * i) % (vocab - 8) + 4 for i in range(length)] for row in range(rows)
    ]
