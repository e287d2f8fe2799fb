"""Gemma 2: gqa and a gated tanh-GELU, norms on both sides of each, windows on every other layer, capped scores."""

from dataclasses import replace
from typing import Any

from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours, option
from models.hub.hf.fields import Fields
from models.hub.hf.layout import above_one
from models.hub.hf.parts import (
    attention,
    attention_fields,
    capped,
    decoder,
    decoder_fields,
    mlp,
    mlp_fields,
    shape,
    windows,
    windows_fields,
)
from models.mixers.gqa import GQA

NORMS = {
    "mixer_norm": "input_layernorm",
    "mixer_out_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_out_norm": "post_feedforward_layernorm",
}


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    bias = f.flag("attention_bias", False)
    mixer = attention(
        f,
        dim,
        head_dim=256,
        positions=rope.read(f),
        scores=capped("softmax", f.cap("attn_logit_softcapping", 50.0)),
        bias=bias,
        out_bias=bias,
    )
    scalar = f.number("query_pre_attn_scalar", 256)
    mixer = replace(mixer, scale=0.0 if scalar == (mixer.head_dim or dim // mixer.heads) else scalar**-0.5)
    absent = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    mixers = [replace(mixer, window=w) for w in windows(f, layers, f.window("sliding_window", 4096), absent)]
    f.ignore("sliding_window_size")  # sliding_window decides
    f.only("use_bidirectional_attention", False)
    f.only("hidden_act", "gelu_pytorch_tanh")  # old configs hold it beside hidden_activation, which decides
    ffn = mlp(f, "hidden_activation", absent="gelu_pytorch_tanh")
    head = capped("lm", f.cap("final_logit_softcapping", 30.0))
    frame = {"norms": NORMS, "norm_row": above_one, "tied": True, "block": "norm_placement(placement=sandwich)"}
    return decoder(f, dim, mixers, [ffn] * layers, **frame, head=head, scale=dim**0.5)


def write(m: Ours) -> dict[str, Any]:
    mixer = m.first(GQA)
    c = mixer.config
    return {
        "architectures": ["Gemma2ForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **mlp_fields(m, "hidden_activation"),
        **rope.write(c.positions, mixer.head_dim),
        **windows_fields(m),
        "query_pre_attn_scalar": round((c.scale or mixer.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": option(c.scores, "score", "softcap") or None,
        "final_logit_softcapping": option(m.config.head, "head", "softcap") or None,
        "attention_bias": c.bias,
    }
