"""BitNet b1.58 as stored in bf16: Llama with a squared-ReLU gate and norms before the projections back.

The ternary weights themselves come with a quantization_config, which is not honoured.
"""

from typing import Any

from models.ffn.swiglu import SwiGLU
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, same
from models.hub.hf.parts import (
    attention,
    attention_fields,
    attention_rows,
    decoder,
    decoder_fields,
    mlp,
    mlp_fields,
    mlp_rows,
    shape,
)
from models.mixers.gqa import GQA


def _attention_rows(c: GQA.Config, dim: int) -> list[Row]:
    return attention_rows(c, dim) + [same("mixer.out_norm.weight", "self_attn.attn_sub_norm.weight")]


def _mlp_rows(c: SwiGLU.Config, dim: int) -> list[Row]:
    return mlp_rows(c, dim) + [same("ffn.hidden_norm.weight", "mlp.ffn_sub_norm.weight")]


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    bias = f.flag("attention_bias", False)
    mixer = attention(f, dim, positions=rope.read(f, 5e5), bias=bias, out_bias=bias, out_norm=True)
    if mixer.head_dim:
        raise ValueError(f"config.json: head_dim={mixer.head_dim} is not honoured: here it is hidden_size over heads")
    ffn = mlp(f, absent="relu2", hidden_norm=True)
    rows = {GQA.Config: _attention_rows, SwiGLU.Config: _mlp_rows}
    return decoder(f, dim, [mixer] * layers, [ffn] * layers, rows, eps=("rms_norm_eps", 1e-5))


def write(m: Ours) -> dict[str, Any]:
    c = m.first(GQA).config
    return {
        "architectures": ["BitNetForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **mlp_fields(m),
        **rope.write(c.positions, m.first(GQA).head_dim),
        "attention_bias": c.bias,
    }
