"""Qwen3-Next: three layers of gated_deltanet, then one of gated attention; experts beside a gated shared one."""

from typing import Any

import torch

from models.ffn.moe_v2 import MoEV2
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.experts import expert_rows, shared_rows
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, above_one, constant, linear, same, shaped
from models.hub.hf.parts import attention, attention_fields, decoder, decoder_fields, dense_fields, shape, silu_mlp
from models.mixers.gated_attention import GatedAttention
from models.mixers.gated_deltanet import GatedDeltaNet

LINEAR, FULL = "linear_attention", "full_attention"


def _attention_rows(c: GatedAttention.Config, dim: int) -> list[Row]:
    """Their q_proj holds each head's query and its gate, one below the other."""
    size = c.head_dim or dim // c.heads
    wide, keys = c.heads * size, c.kv_heads * size
    pairs = torch.arange(2 * wide).view(c.heads, 2, size)
    rest = 2 * wide + torch.arange(2 * keys)
    order = torch.cat([pairs[:, 0].flatten(), rest, pairs[:, 1].flatten()])
    ours = {"mixer.wqkv": wide + 2 * keys, "mixer.wg": wide}
    theirs = {"self_attn.q_proj": 2 * wide, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    rows = linear(ours, theirs, c.bias, order) + linear("mixer.wo", {"self_attn.o_proj": dim}, c.out_bias)
    return rows + [above_one(f"mixer.{part}_norm.weight", f"self_attn.{part}_norm.weight") for part in "qk"]


def _deltanet_rows(c: GatedDeltaNet.Config, dim: int) -> list[Row]:
    """Theirs hold q, k, v, z and b, a key head by key head."""
    group = c.heads // c.key_heads
    sizes = [c.key_dim, c.key_dim, group * c.value_dim, group * c.value_dim]
    wide = c.key_heads * sum(sizes)
    by_head = torch.arange(wide).view(c.key_heads, -1).split(sizes, 1)
    small = (wide + torch.arange(2 * c.heads)).view(c.key_heads, -1).split([group, group], 1)
    order = torch.cat([part.flatten() for part in (*by_head, *small)])
    name = "linear_attn."
    return [
        *linear("mixer.wi", {f"{name}in_proj_qkvz": wide, f"{name}in_proj_ba": 2 * c.heads}, False, order),
        shaped("mixer.conv", f"{name}conv1d.weight", -1, 1, c.conv),
        same("mixer.log_decay", f"{name}A_log"),
        same("mixer.step_bias", f"{name}dt_bias"),
        same("mixer.norm.weight", f"{name}norm.weight"),
        same("mixer.wo.weight", f"{name}out_proj.weight"),
    ]


def _moe_rows(c: MoEV2.Config, dim: int) -> list[Row]:
    gate = same("ffn.shared_gate.weight", "mlp.shared_expert_gate.weight")
    return [*expert_rows(c), *shared_rows(c, dim, "mlp.shared_expert"), gate, constant("ffn.bias", 0.0)]


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    bias = f.flag("attention_bias", False)
    full = attention(
        f, dim, head_dim=256, positions=rope.read(f, fraction=0.25), bias=bias, out_bias=bias, qk_norm=True
    )
    full = GatedAttention.Config(**vars(full))
    linear_ = GatedDeltaNet.Config(
        heads=f.whole("linear_num_value_heads", 32),
        key_heads=f.whole("linear_num_key_heads", 16),
        key_dim=f.whole("linear_key_head_dim", 128),
        value_dim=f.whole("linear_value_head_dim", 128),
        conv=f.whole("linear_conv_kernel_dim", 4),
    )
    if linear_.heads % linear_.key_heads:
        raise ValueError("config.json: linear_num_value_heads must be a multiple of linear_num_key_heads")
    f.only("use_sliding_window", False)
    every = f.whole("full_attention_interval", 4)
    kinds = f.kinds("layer_types", layers, (LINEAR, FULL), [LINEAR if (i + 1) % every else FULL for i in range(layers)])
    ffn = silu_mlp(f)
    step, dense = f.whole("decoder_sparse_step", 1), f.wholes("mlp_only_layers", [])
    moe = MoEV2.Config(
        hidden=f.whole("moe_intermediate_size", 512),
        experts=f.whole("num_experts", 512),
        active=f.whole("num_experts_per_tok", 10),
        normalize=f.flag("norm_topk_prob", True),
        shared=f.whole("shared_expert_intermediate_size", 512),
        shared_gate=True,
        score="softmax",
    )
    ffns = [ffn if i in dense or (i + 1) % step else moe for i in range(layers)]
    rows = {GatedAttention.Config: _attention_rows, GatedDeltaNet.Config: _deltanet_rows, MoEV2.Config: _moe_rows}
    mixers = [linear_ if kind == LINEAR else full for kind in kinds]
    return decoder(f, dim, mixers, ffns, rows, norm_row=above_one, skipped=r"mtp\..*")


def write(m: Ours) -> dict[str, Any]:
    full, linear_, moe = m.first(GatedAttention), m.first(GatedDeltaNet), m.first(MoEV2)
    c = moe.config
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **rope.write(full.config.positions, full.head_dim, partial=True),
        **dense_fields(m, moe.experts.wo.shape[1]),
        "attention_bias": full.config.bias,
        "layer_types": [LINEAR if isinstance(mixer, GatedDeltaNet.Config) else FULL for mixer in m.mixers],
        "linear_num_value_heads": linear_.config.heads,
        "linear_num_key_heads": linear_.config.key_heads,
        "linear_key_head_dim": linear_.key_dim,
        "linear_value_head_dim": linear_.value_dim,
        "linear_conv_kernel_dim": linear_.config.conv,
        "mlp_only_layers": [i for i, ffn in enumerate(m.ffns) if not isinstance(ffn, MoEV2.Config)],
        "moe_intermediate_size": moe.experts.wo.shape[1],
        "num_experts": c.experts,
        "num_experts_per_tok": c.active,
        "norm_topk_prob": c.normalize,
        "shared_expert_intermediate_size": c.shared,
    }
