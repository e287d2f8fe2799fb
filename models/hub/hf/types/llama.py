"""Llama: a decoder of gqa and swiglu."""

from typing import Any

from models.ffn.swiglu import SwiGLU
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.parts import attention, attention_fields, decoder, decoder_fields, mlp, mlp_fields, shape
from models.mixers.gqa import GQA


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    bias = f.flag("attention_bias", False)
    mixer = attention(f, dim, positions=rope.read(f), bias=bias, out_bias=bias)
    ffn = mlp(f, bias=f.flag("mlp_bias", False))
    f.only("pretraining_tp", 1)
    return decoder(f, dim, [mixer] * layers, [ffn] * layers)


def write(m: Ours) -> dict[str, Any]:
    c = m.first(GQA).config
    return {
        "architectures": ["LlamaForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **mlp_fields(m),
        **rope.write(c.positions, m.first(GQA).head_dim),
        "attention_bias": c.bias,
        "mlp_bias": m.first(SwiGLU).config.bias,
    }
