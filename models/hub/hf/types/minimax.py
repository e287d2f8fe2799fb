"""MiniMax-01: lightning attention, now and then softmax attention, and experts; weighted sums after each norm."""

from typing import Any

from models.blocks.norm_placement import NormPlacement
from models.config import to_text
from models.ffn.moe import MoE
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours, tiled
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, same
from models.hub.hf.parts import attention, attention_fields, decoder, decoder_fields, shape
from models.hub.hf.types.mixtral import moe, moe_fields, moe_rows
from models.mixers.gqa import GQA
from models.mixers.lightning_attention import LightningAttention

LINEAR, FULL = "linear_attention", "full_attention"
DERIVED = r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"


def _lightning_rows(c: LightningAttention.Config, dim: int) -> list[Row]:
    names = {"wqkv": "qkv_proj", "wg": "output_gate", "norm": "norm", "wo": "out_proj"}
    return [same(f"mixer.{ours}.weight", f"self_attn.{theirs}.weight") for ours, theirs in names.items()]


def _factors(f: Fields, name: str, mlp: tuple[float, float]) -> NormPlacement.Config:
    alpha, beta = f.number(f"{name}_alpha_factor", 1.0), f.number(f"{name}_beta_factor", 1.0)
    return NormPlacement.Config("first", (alpha, mlp[0]), (beta, mlp[1]))


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    full = attention(f, dim, positions=rope.read(f, 1e6), window=f.window("sliding_window"))
    linear = LightningAttention.Config(full.heads, full.head_dim)
    absent = [LINEAR if i % 2 else FULL for i in range(layers)]
    kinds = f.kinds("layer_types", layers, (LINEAR, FULL), absent)
    mlp = f.number("mlp_alpha_factor", 1.0), f.number("mlp_beta_factor", 1.0)
    blocks = {LINEAR: _factors(f, "linear_attn", mlp), FULL: _factors(f, "full_attn", mlp)}
    f.ignore("block_size")
    return decoder(
        f,
        dim,
        [linear if kind == LINEAR else full for kind in kinds],
        [moe(f)] * layers,
        {MoE.Config: moe_rows, LightningAttention.Config: _lightning_rows},
        eps=("rms_norm_eps", 1e-5),
        skipped=DERIVED,
        block=tiled([blocks[kind] for kind in kinds]),
    )


def write(m: Ours) -> dict[str, Any]:
    mixer = m.first(GQA)
    kinds = [LINEAR if isinstance(c, LightningAttention.Config) else FULL for c in m.mixers]
    record = {
        "architectures": ["MiniMaxForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **moe_fields(m),
        **rope.write(mixer.config.positions, mixer.head_dim),
        "sliding_window": mixer.config.window or None,
        "layer_types": kinds,
    }
    for kind, block in zip(kinds, m.blocks):
        if not isinstance(block, NormPlacement.Config) or block.placement != "first":
            raise ValueError(f"its blocks are norm_placement(placement=first), not {to_text(block)}")
        name = "linear_attn" if kind == LINEAR else "full_attn"
        for factor in ("alpha", "beta"):
            values = getattr(block, factor)
            record |= {f"{name}_{factor}_factor": values[0], f"mlp_{factor}_factor": values[-1]}
    return record
