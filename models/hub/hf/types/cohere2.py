"""Cohere 2 (Command R7B): attention and ffn side by side after one LayerNorm; RoPE only in layers with windows."""

from dataclasses import replace
from functools import partial
from typing import Any

from models.config import to_text
from models.heads.lm import LM
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours, option
from models.hub.hf.fields import Fields
from models.hub.hf.parts import (
    attention,
    attention_fields,
    attention_rows,
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
    mixer = attention(f, dim, positions=rope.read(f), bias=bias, out_bias=bias)
    if mixer.head_dim:
        raise ValueError(f"config.json: head_dim={mixer.head_dim} is not honoured: here it is hidden_size over heads")
    for name in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block", "use_parallel_embedding"):
        f.only(name, True)
    f.only("position_embedding_type", "rope_gptj")
    f.only("rotary_pct", 1.0)
    f.ignore("layer_switch", "order_of_interleaved_layers")  # as sliding_window_pattern
    every = f.whole("sliding_window_pattern", 4)
    absent = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    found = windows(f, layers, f.window("sliding_window", 4096), absent)
    mixers = [replace(mixer, window=w, positions=mixer.positions if w else "nope") for w in found]
    head = to_text(LM.Config(logit_scale=f.number("logit_scale", 0.0625)))
    frame = {"block": "norm_placement(placement=parallel)", "norm": "layer", "tied": True}
    rows = {GQA.Config: partial(attention_rows, paired=True)}
    norms, eps = {"mixer_norm": "input_layernorm"}, ("layer_norm_eps", 1e-5)
    return decoder(f, dim, mixers, [mlp(f)] * layers, rows, norms, eps=eps, head=head, **frame)


def write(m: Ours) -> dict[str, Any]:
    mixer = m.first(GQA)
    positions = next((c.positions for c in m.only(GQA) if c.window), "rope")
    return {
        "architectures": ["Cohere2ForCausalLM"],
        **decoder_fields(m, "layer_norm_eps"),
        **attention_fields(m),
        **mlp_fields(m),
        **rope.write(positions, mixer.head_dim),
        **windows_fields(m),
        "attention_bias": mixer.config.bias,
        "logit_scale": option(m.config.head, "head", "logit_scale"),
    }
