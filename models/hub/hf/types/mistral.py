"""Mistral: Llama without biases, whose attention may have a window."""

from typing import Any

from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.parts import attention, attention_fields, decoder, decoder_fields, mlp, mlp_fields, shape
from models.mixers.gqa import GQA


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    mixer = attention(f, dim, positions=rope.read(f), window=f.window("sliding_window", 4096))
    return decoder(f, dim, [mixer] * layers, [mlp(f)] * layers)


def write(m: Ours) -> dict[str, Any]:
    c = m.first(GQA).config
    return {
        "architectures": ["MistralForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **mlp_fields(m),
        **rope.write(c.positions, m.first(GQA).head_dim),
        "sliding_window": c.window or None,
    }
