"""Phi-3: Llama whose projections are stored in one, with a window and LongRoPE on a fraction of a head's channels."""

from typing import Any

from models.ffn.swiglu import SwiGLU
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, linear
from models.hub.hf.parts import attention, attention_fields, decoder, decoder_fields, mlp, mlp_fields, shape
from models.mixers.gqa import GQA


def _attention_rows(c: GQA.Config, dim: int) -> list[Row]:
    head_dim = c.head_dim or dim // c.heads
    rows = linear("mixer.wqkv", {"self_attn.qkv_proj": (c.heads + 2 * c.kv_heads) * head_dim})
    return rows + linear("mixer.wo", {"self_attn.o_proj": dim})


def _mlp_rows(c: SwiGLU.Config, dim: int) -> list[Row]:
    return linear("ffn.wi", {"mlp.gate_up_proj": 2 * c.hidden}) + linear("ffn.wo", {"mlp.down_proj": dim})


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    positions = rope.read(f, fraction=1.0, original=4096)
    if not positions.startswith(("rope", "longrope")):
        raise ValueError(f"config.json: rope_parameters of phi3 can be default or longrope, not {positions}")
    f.only("attention_bias", False)
    mixer = attention(f, dim, positions=positions, window=f.window("sliding_window"))
    rows = {GQA.Config: _attention_rows, SwiGLU.Config: _mlp_rows}
    return decoder(f, dim, [mixer] * layers, [mlp(f)] * layers, rows, eps=("rms_norm_eps", 1e-5))


def write(m: Ours) -> dict[str, Any]:
    c = m.first(GQA).config
    record = rope.write(c.positions, m.first(GQA).head_dim, partial=True)
    original = record["rope_parameters"].get("original_max_position_embeddings", record["max_position_embeddings"])
    return {
        "architectures": ["Phi3ForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **mlp_fields(m),
        **record,
        "original_max_position_embeddings": original,
        "sliding_window": c.window or None,
        "pad_token_id": None,
    }
