"""Mixtral: Mistral with experts for ffns."""

from typing import Any

from models.ffn.moe import MoE
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.experts import expert_rows
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row
from models.hub.hf.parts import attention, attention_fields, decoder, decoder_fields, shape
from models.mixers.gqa import GQA


def moe(f: Fields) -> MoE.Config:
    f.only("hidden_act", "silu")
    experts, active = f.whole("num_local_experts", 8), f.whole("num_experts_per_tok", 2)
    return MoE.Config(hidden=f.whole("intermediate_size"), experts=experts, active=active)


def moe_fields(m: Ours) -> dict[str, Any]:
    ffn = m.first(MoE)
    c = ffn.config
    sizes = {"intermediate_size": ffn.experts.wo.shape[1], "num_local_experts": c.experts}
    return sizes | {"num_experts_per_tok": c.active}


def moe_rows(c: MoE.Config, dim: int) -> list[Row]:
    return expert_rows(c, "block_sparse_moe.", ("w1", "w3"), "w2")


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    mixer = attention(f, dim, positions=rope.read(f, 1e6), window=f.window("sliding_window"))
    rows = {MoE.Config: moe_rows}
    return decoder(f, dim, [mixer] * layers, [moe(f)] * layers, rows, eps=("rms_norm_eps", 1e-5))


def write(m: Ours) -> dict[str, Any]:
    c = m.first(GQA).config
    return {
        "architectures": ["MixtralForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **moe_fields(m),
        **rope.write(c.positions, m.first(GQA).head_dim),
        "sliding_window": c.window or None,
    }
