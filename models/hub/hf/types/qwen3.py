"""Qwen3: Qwen2 with norms on queries and keys, biases on all projections of the attention or on none."""

from typing import Any

from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.types import qwen2
from models.mixers.gqa import GQA


def read(f: Fields) -> Checkpoint:
    bias = f.flag("attention_bias", False)
    return qwen2.read(f, head_dim=128, bias=bias, out_bias=bias, qk_norm=True)


def write(m: Ours) -> dict[str, Any]:
    return qwen2.write(m) | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": m.only(GQA)[0].bias}
