"""SmolLM3: Llama in which every few layers have no positions (NoPE)."""

from dataclasses import replace
from typing import Any

from models.ffn.swiglu import SwiGLU
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.parts import (
    attention,
    attention_fields,
    decoder,
    decoder_fields,
    mlp,
    mlp_fields,
    shape,
    windows,
    windows_fields,
)
from models.mixers.gqa import GQA


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    bias = f.flag("attention_bias", False)
    mixer = attention(f, dim, positions=rope.read(f, 2e6), bias=bias, out_bias=bias)
    ffn = mlp(f, bias=f.flag("mlp_bias", False))
    f.ignore("max_window_layers", "pretraining_tp")
    turned = rope.turned_layers(f, layers)
    window = f.window("sliding_window") * f.flag("use_sliding_window", False)
    absent = ["sliding_attention" if window and not turns else "full_attention" for turns in turned]
    mixers = [
        replace(mixer, window=w, positions=mixer.positions if turns else "nope")
        for w, turns in zip(windows(f, layers, window, absent), turned)
    ]
    return decoder(f, dim, mixers, [ffn] * layers, tied=True)


def write(m: Ours) -> dict[str, Any]:
    c = m.first(GQA).config
    turned = [c.positions != "nope" for c in m.only(GQA)]
    positions = next((c.positions for c in m.only(GQA) if c.positions != "nope"), "rope")
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **mlp_fields(m),
        **rope.write(positions, m.first(GQA).head_dim),
        **windows_fields(m),
        "no_rope_layers": [int(turns) for turns in turned],
        "use_sliding_window": any(c.window for c in m.only(GQA)),
        "attention_bias": c.bias,
        "mlp_bias": m.first(SwiGLU).config.bias,
        "pad_token_id": None,
    }
