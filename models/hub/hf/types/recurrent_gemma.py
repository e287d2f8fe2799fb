"""RecurrentGemma (Griffin): two layers of hawk, then one of attention in a window; gated tanh-GELU ffns."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.config import parse_part
from models.ffn.swiglu import SwiGLU
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours, option
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, above_one, linear, same, shaped
from models.hub.hf.parts import (
    attention,
    attention_fields,
    attention_rows,
    capped,
    decoder,
    decoder_fields,
    mlp_rows,
    shape,
)
from models.mixers.gqa import GQA
from models.mixers.hawk import Hawk
from models.positions.rope import RoPE

NORMS = {"mixer_norm": "temporal_pre_norm", "ffn_norm": "channel_pre_norm"}


def _pair(ours: str, first: str, second: str) -> Row:
    """Two of theirs are the two entries of ours."""

    def split(parts: list[Tensor]) -> list[Tensor]:
        return list(parts[0])

    return Row((ours,), (first, second), lambda parts, like: [torch.stack(parts)], split)


def _hawk_rows(c: Hawk.Config, dim: int) -> list[Row]:
    name = "temporal_block."
    gates = [f"{name}rg_lru.{gate}_gate" for gate in ("input", "recurrent")]
    return [
        *linear("mixer.wi", {f"{name}linear_y": c.width, f"{name}linear_x": c.width}, True),
        shaped("mixer.conv", f"{name}conv_1d.weight", -1, 1, c.conv),
        same("mixer.conv_bias", f"{name}conv_1d.bias"),
        _pair("mixer.gates", *(f"{gate}_weight" for gate in gates)),
        _pair("mixer.gate_bias", *(f"{gate}_bias" for gate in gates)),
        same("mixer.decay", f"{name}rg_lru.recurrent_param"),
        *linear("mixer.wo", {f"{name}linear_out": dim}, True),
    ]


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    positions = rope.read(f, fraction=0.5)
    scheme, turning = parse_part(positions, "position")
    if scheme is not RoPE or turning.factor != 1:
        raise ValueError(f"config.json: rope_parameters of recurrent_gemma can be default, not {positions}")
    bias, window = f.flag("attention_bias", False), f.whole("attention_window_size", 2048)
    full = attention(f, dim, positions=positions, window=window, bias=bias, out_bias=True)
    if full.head_dim:
        raise ValueError(f"config.json: head_dim={full.head_dim} is not honoured: here it is hidden_size over heads")
    hawk = Hawk.Config(f.whole("lru_width", dim), full.heads, f.whole("conv1d_width", 4))
    f.ignore("w_init_variance_scale", "final_w_init_variance_scale")
    f.only("hidden_activation", "gelu_pytorch_tanh")
    f.only("hidden_act", "gelu_pytorch_tanh")
    f.only("embeddings_scale_by_sqrt_dim", True)
    ffn = SwiGLU.Config(f.whole("intermediate_size") // 2, bias=True, activation="gelu_tanh")
    kinds = f.take("block_types", ["recurrent", "recurrent", "attention"])
    f.ignore("_block_types", "layers_block_type")
    if not isinstance(kinds, list) or not kinds or any(kind not in ("recurrent", "attention") for kind in kinds):
        raise ValueError(f"config.json: block_types={kinds!r} must be a list of 'recurrent' and 'attention'")
    kinds = [kinds[i % len(kinds)] for i in range(layers)]
    return decoder(
        f,
        dim,
        [hawk if kind == "recurrent" else full for kind in kinds],
        [ffn] * layers,
        {
            Hawk.Config: _hawk_rows,
            GQA.Config: partial(attention_rows, name="temporal_block."),
            SwiGLU.Config: partial(mlp_rows, name="mlp_block."),
        },
        NORMS,
        above_one,
        ("model.embed_tokens", "model.layers", "model.final_norm", "lm_head"),
        tied=True,
        head=capped("lm", f.number("logits_soft_cap", 30.0)),
        scale=torch.tensor(dim**0.5, dtype=torch.bfloat16).item(),  # so it was trained
    )


def write(m: Ours) -> dict[str, Any]:
    full, hawk = m.first(GQA), m.first(Hawk)
    record = attention_fields(m)
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        **decoder_fields(m),
        **record,
        **rope.write(full.config.positions, full.head_dim, partial=True),
        "attention_window_size": full.config.window,
        "attention_bias": full.config.bias,
        "block_types": ["recurrent" if isinstance(c, Hawk.Config) else "attention" for c in m.mixers],
        "lru_width": hawk.width,
        "conv1d_width": hawk.conv.shape[1],
        "intermediate_size": 2 * m.first(SwiGLU).wo.in_features,
        "logits_soft_cap": option(m.config.head, "head", "softcap"),
        "hidden_activation": "gelu_pytorch_tanh",
    }
