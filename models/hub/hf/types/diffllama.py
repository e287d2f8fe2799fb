"""DiffLlama: Llama with differential attention."""

from typing import Any

import torch

from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row
from models.hub.hf.parts import (
    attention,
    attention_fields,
    attention_rows,
    decoder,
    decoder_fields,
    mlp,
    mlp_fields,
    shape,
)
from models.mixers.diff_transformer import DiffTransformer
from models.mixers.gqa import GQA


def _attention_rows(c: DiffTransformer.Config, dim: int) -> list[Row]:
    names = tuple(f"self_attn.lambda_{part}" for part in ("q1", "k1", "q2", "k2"))
    lambdas = Row(("mixer.lambdas",), names, lambda parts, like: [torch.stack(parts)], lambda xs: list(xs[0]))
    return attention_rows(GQA.Config(**vars(c), out_bias=c.bias), dim) + [lambdas]


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    c = attention(f, dim, positions=rope.read(f), bias=f.flag("attention_bias", False))
    mixer = DiffTransformer.Config(c.heads, c.kv_heads, c.head_dim, positions=c.positions, bias=c.bias)
    f.ignore("lambda_std_dev")
    rows = {DiffTransformer.Config: _attention_rows}
    return decoder(f, dim, [mixer] * layers, [mlp(f)] * layers, rows, eps=("rms_norm_eps", 1e-5))


def write(m: Ours) -> dict[str, Any]:
    mixer = m.first(DiffTransformer)
    return {
        "architectures": ["DiffLlamaForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **mlp_fields(m),
        **rope.write(mixer.config.positions, mixer.head_dim),
        "attention_bias": mixer.config.bias,
    }
