"""DeepSeek-V3: latent attention, experts in groups beside a shared one; the first layers have gated ffns."""

from functools import partial
from typing import Any

from models.ffn.moe_v2 import MoEV2
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.experts import expert_rows, shared_rows
from models.hub.hf.fields import Fields
from models.hub.hf.latent import latent, latent_fields, latent_rows, sharpening_fields
from models.hub.hf.layout import Row, same
from models.hub.hf.parts import decoder, decoder_fields, dense_fields, shape, silu_mlp
from models.mixers.mla import MLA


def _moe_rows(c: MoEV2.Config, dim: int) -> list[Row]:
    bias = same("ffn.bias", "mlp.gate.e_score_correction_bias")
    return [*expert_rows(c), *shared_rows(c, dim, "mlp.shared_experts"), bias]


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    sharpening = rope.sharpening(f)
    mixer = latent(f, rope.read(f), sharpening)
    f.only("head_dim", mixer.rope_dim)
    f.only("pretraining_tp", 1)
    hidden = f.whole("moe_intermediate_size", 2048)
    moe = MoEV2.Config(
        hidden=hidden,
        experts=f.whole("n_routed_experts", 256),
        active=f.whole("num_experts_per_tok", 8),
        normalize=f.flag("norm_topk_prob", True),
        shared=hidden * f.whole("n_shared_experts", 1),
        groups=f.whole("n_group", 8),
        best_groups=f.whole("topk_group", 4),
        scale=f.number("routed_scaling_factor", 2.5),
    )
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    f.only("moe_layer_freq", 1)
    f.only("ep_size", 1)
    f.ignore("seq_aux", "aux_loss_alpha")
    dense = f.whole("first_k_dense_replace", 3, low=0)
    ffn = silu_mlp(f)
    ahead = f.whole("num_nextn_predict_layers", 1, low=0)  # layers that predict further tokens
    more = "|".join(str(layers + i) for i in range(ahead))
    rows = {MLA.Config: partial(latent_rows, paired=f.flag("rope_interleave", True)), MoEV2.Config: _moe_rows}
    ffns = [ffn if i < dense else moe for i in range(layers)]
    return decoder(f, dim, [mixer] * layers, ffns, rows, skipped=rf"model\.layers\.({more})\..*" if more else "")


def write(m: Ours) -> dict[str, Any]:
    mixer = m.first(MLA)
    moe = m.first(MoEV2)
    c, hidden = moe.config, moe.experts.wo.shape[1]
    record = rope.write(mixer.config.positions, mixer.config.rope_dim)
    record["rope_parameters"] |= sharpening_fields(mixer.config)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **decoder_fields(m),
        **latent_fields(m),
        **record,
        **dense_fields(m, hidden),
        "first_k_dense_replace": sum(type(ffn) is not MoEV2.Config for ffn in m.ffns),
        "moe_intermediate_size": hidden,
        "n_routed_experts": c.experts,
        "num_experts_per_tok": c.active,
        "norm_topk_prob": c.normalize,
        "n_shared_experts": c.shared // hidden,
        "n_group": c.groups,
        "topk_group": c.best_groups,
        "routed_scaling_factor": c.scale,
        "num_nextn_predict_layers": 0,
    }
