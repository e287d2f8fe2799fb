"""Qwen2: Llama with biases on q, k and v; windows on the upper layers."""

from dataclasses import replace
from typing import Any

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


def read(f: Fields, **options: Any) -> Checkpoint:
    """options: of the attention, where another type differs; by default biases as in Qwen2."""
    dim, layers = shape(f)
    mixer = attention(f, dim, positions=rope.read(f), **(options or {"bias": True}))
    window = f.window("sliding_window", 4096)
    window *= f.flag("use_sliding_window", False)
    first = f.whole("max_window_layers", 28, low=0)
    absent = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    mixers = [replace(mixer, window=w) for w in windows(f, layers, window, absent)]
    return decoder(f, dim, mixers, [mlp(f)] * layers)


def write(m: Ours) -> dict[str, Any]:
    c = m.first(GQA).config
    return {
        "architectures": ["Qwen2ForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **mlp_fields(m),
        **rope.write(c.positions, m.first(GQA).head_dim),
        **windows_fields(m),
        "use_sliding_window": any(c.window for c in m.only(GQA)),
    }
