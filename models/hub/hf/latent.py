"""Multi-head latent attention of checkpoints, in both directions; its latents' norms have an eps of their own."""

import math
from typing import Any

from models.config import parse_part
from models.hub.hf.checkpoint import Ours
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, same, shaped, stacked, unpaired
from models.mixers.mla import MLA
from models.positions.yarn import YaRN

EPS = 1e-6


def latent(f: Fields, positions: str, sharpening: float = 1.0) -> MLA.Config:
    """sharpening: what scores are multiplied with beside the usual."""
    heads = f.whole("num_attention_heads")
    f.only("num_key_value_heads", heads)
    f.only("attention_bias", False)
    nope, rope = f.whole("qk_nope_head_dim", 128), f.whole("qk_rope_head_dim", 64)
    f.only("qk_head_dim", nope + rope)
    return MLA.Config(
        heads=heads,
        latent=f.whole("kv_lora_rank", 512),
        query_latent=f.whole("q_lora_rank", 0),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=f.whole("v_head_dim", 128),
        positions=positions,
        scale=0.0 if sharpening == 1 else (nope + rope) ** -0.5 * sharpening,
        eps=EPS,
    )


def latent_fields(m: Ours) -> dict[str, Any]:
    c = m.first(MLA).config
    return {
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.heads,
        "kv_lora_rank": c.latent,
        "q_lora_rank": c.query_latent or None,
        "qk_nope_head_dim": c.nope_dim,
        "qk_rope_head_dim": c.rope_dim,
        "v_head_dim": c.value_dim,
    }


def sharpening_fields(c: MLA.Config) -> dict[str, Any]:
    """The rotary parameter that `rope.sharpening` reads."""
    yarn = parse_part(c.positions, "position")[1]
    if not c.scale or not isinstance(yarn, YaRN.Config) or yarn.factor <= 1:
        return {}
    root = (c.scale * (c.nope_dim + c.rope_dim) ** 0.5) ** 0.5
    return {"mscale_all_dim": round((root - 1) / (0.1 * math.log(yarn.factor)), 9)}


def latent_rows(c: MLA.Config, dim: int, paired: bool = True) -> list[Row]:
    """paired: their rotary pairs are neighbours."""
    width = c.nope_dim + c.rope_dim
    queries = unpaired(c.heads, width, c.rope_dim, c.nope_dim) if paired else None
    keys = unpaired(1, c.latent + c.rope_dim, c.rope_dim, c.latent) if paired else None
    rows = []
    if c.query_latent:
        rows += [
            same("mixer.wq_down.weight", "self_attn.q_a_proj.weight"),
            same("mixer.q_norm.weight", "self_attn.q_a_layernorm.weight"),
        ]
    name = "self_attn.q_b_proj.weight" if c.query_latent else "self_attn.q_proj.weight"
    return rows + [
        stacked("mixer.wq.weight", {name: c.heads * width}, queries),
        stacked("mixer.wc.weight", {"self_attn.kv_a_proj_with_mqa.weight": c.latent + c.rope_dim}, keys),
        same("mixer.c_norm.weight", "self_attn.kv_a_layernorm.weight"),
        shaped("mixer.up", "self_attn.kv_b_proj.weight", -1, c.latent),
        same("mixer.wo.weight", "self_attn.o_proj.weight"),
    ]
