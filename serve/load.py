"""An engine from a place: the weights there, what they are computed in and held as, a tokenizer, a drafter."""

import torch
from tokenizers import Tokenizer

from cluster import folder
from models import hub, quant
from serve import drafters
from serve.engine import Engine
from serve.template import CONFIG, spelling


def load(
    path: str,
    *,
    dtype: str = "",
    weights: str = "",
    draft: str = "off",
    max_rows: int = 32,
    max_len: int = 2048,
    **options: object,
) -> Engine:
    """The engine of a run (its newest checkpoint) or a model folder. One line of ValueError when it is not one.

    dtype: what is computed in, fp32 or bf16; "" for what is stored. weights: how linear weights are held, fp32, bf16,
    int8 or int4 as of `models.quant.pack`; "" packs bf16 on a CPU, where it is faster and no worse, and nothing else.
    The `eos_token` of a tokenizer_config.json in it is an end token too. draft: as of `serve.drafters.make`.
    """
    place = hub.locate(path)
    stored = folder.load(place)
    tokenizer = Tokenizer.from_str(stored.text("tokenizer.json")) if "tokenizer.json" in stored else None
    end = spelling(stored.json(CONFIG).get("eos_token")) if CONFIG in stored else ""
    model = hub.load(place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = quant.held(model.to(device), dtype, weights)
    drafter = drafters.make(draft, model, max_rows, max_len)
    ends = [end] if end else []
    return Engine(model, tokenizer, max_rows=max_rows, max_len=max_len, ends=ends, drafter=drafter, **options)
