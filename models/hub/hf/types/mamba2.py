"""Mamba-2: a stack of mamba_ssd without ffns."""

import math
from functools import partial
from typing import Any

from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.parts import decoder, decoder_fields, shape
from models.hub.hf.state_space import mamba, mamba_fields, mamba_rows
from models.mixers.mamba_ssd import MambaSSD

NAMES = ("backbone.embeddings", "backbone.layers", "backbone.norm_f", "lm_head")


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    limits = f.take("time_step_limit", [0.0, math.inf])
    numbers = isinstance(limits, list) and len(limits) == 2 and all(type(x) in (int, float) for x in limits)
    if not numbers or not 0 <= limits[0] <= limits[1] or limits[0] == math.inf:
        raise ValueError(f"config.json: time_step_limit={limits!r} must be two numbers from 0 up, in order")
    f.ignore("time_step_min", "norm_before_gate", "rms_norm")
    f.only("rescale_prenorm_residual", False)  # transformers divides the weights it loads where it is true
    bounds = tuple(float(x) for x in limits if x < math.inf)
    mixer = mamba(f, limits=() if bounds == (0.0,) else bounds)
    if mixer.heads * mixer.head_dim != dim * f.whole("expand", 2):
        raise ValueError("config.json: num_heads * head_dim must be expand * hidden_size")
    rows = {MambaSSD.Config: partial(mamba_rows, bias=f.flag("use_conv_bias", True))}
    frame = {"norms": {"mixer_norm": "norm"}, "names": NAMES, "eps": ("layer_norm_epsilon", 1e-5)}
    return decoder(f, dim, [mixer] * layers, [None] * layers, rows, **frame)


def write(m: Ours) -> dict[str, Any]:
    mixer = m.first(MambaSSD)
    limits = [*mixer.config.limits, math.inf][:2]
    return {
        "architectures": ["Mamba2ForCausalLM"],
        **decoder_fields(m, "layer_norm_epsilon"),
        **mamba_fields(m),
        "expand": mixer.heads * mixer.config.head_dim // m.config.dim,
        **({"time_step_limit": limits} if mixer.config.limits else {}),
    }
