"""Nemotron-H: layers of one branch each, mamba_ssd, attention without positions, squared-ReLU ffns or experts."""

import math
from functools import partial
from typing import Any

from models.ffn.moe_v2 import MoEV2
from models.ffn.squared_relu import SquaredReLU
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.experts import expert_rows, shared_rows
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, linear, same
from models.hub.hf.parts import attention, attention_fields, attention_rows, decoder, decoder_fields
from models.hub.hf.state_space import mamba, mamba_fields, mamba_rows
from models.mixers.gqa import GQA
from models.mixers.mamba_ssd import MambaSSD

KINDS = {"linear_attention": MambaSSD, "full_attention": GQA, "mlp": SquaredReLU, "moe": MoEV2}
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLD = {"mamba": "linear_attention", "attention": "full_attention"}
NAMES = ("backbone.embeddings", "backbone.layers", "backbone.norm_f", "lm_head")
MAMBA = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "mamba_hidden_act")


def _mlp_rows(c: SquaredReLU.Config, dim: int) -> list[Row]:
    return linear("ffn.wi", {"mixer.up_proj": c.hidden}, c.bias) + linear("ffn.wo", {"mixer.down_proj": dim}, c.bias)


def _moe_rows(c: MoEV2.Config, dim: int) -> list[Row]:
    rows = expert_rows(c, "mixer.", ["up_proj"])
    rows += shared_rows(c, dim, "mixer.shared_experts", ["up_proj"])
    rows.append(same("ffn.bias", "mixer.gate.e_score_correction_bias"))
    if c.latent:
        rows += linear("ffn.into", {"mixer.fc1_latent_proj": c.latent})
        rows += linear("ffn.wo", {"mixer.fc2_latent_proj": dim})
    return rows


def _moe(f: Fields) -> MoEV2.Config:
    return MoEV2.Config(
        hidden=f.whole("moe_intermediate_size", 7688),
        experts=f.whole("n_routed_experts", 8),
        active=f.whole("num_experts_per_tok", 2),
        activation="relu2",
        normalize=f.flag("norm_topk_prob", True),
        shared=f.whole("moe_shared_expert_intermediate_size", 7688),
        groups=f.whole("n_group", 1),
        best_groups=f.whole("topk_group", 1),
        scale=f.number("routed_scaling_factor", 1.0),
        latent=f.whole("moe_latent_size", 0),
    )


def read(f: Fields) -> Checkpoint:
    dim = f.whole("hidden_size")
    letters = f.take("hybrid_override_pattern", "")
    given = "layers_block_type" if f.peek("layer_types") is None else "layer_types"
    kinds = [LETTERS.get(letter, letter) for letter in str(letters)] or f.take(given)
    f.ignore("num_hidden_layers", "n_shared_experts", "moe_shared_expert_overlap", "num_logits_to_keep")
    f.ignore("use_mamba_kernels", "mamba_ssm_cache_dtype", "max_position_embeddings", "expand")
    f.ignore("num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "rope_parameters")
    f.only("mlp_hidden_act", "relu2")
    f.only("mamba_proj_bias", False)
    f.only("sliding_window", None)
    f.only("time_step_limit", [0.0, math.inf])
    f.only("tie_word_embeddings", False)
    f.only("attention_bias", False)
    conv_bias = f.flag("use_conv_bias", True)
    least = f.take("time_step_min", 0.001)
    if type(least) not in (int, float) or not 0 <= least < math.inf:
        raise ValueError(f"config.json: time_step_min={least!r} must be a number from 0 up")
    named = [OLD.get(str(kind), str(kind)) for kind in kinds] if isinstance(kinds, list) else []
    if not named or set(named) - set(KINDS):
        raise ValueError(f"config.json: {given}={kinds!r} must be a list of {', '.join(KINDS)}")
    kinds = named
    parts = {
        "linear_attention": mamba(f, MAMBA, group_norm=True, limits=(float(least),) if least else ()),
        "mlp": SquaredReLU.Config(f.whole("intermediate_size", 21504), f.flag("mlp_bias", False)),
        "moe": _moe(f),
    }
    if "full_attention" in kinds:
        parts["full_attention"] = attention(f, dim, head_dim=128, positions="nope")
    f.ignore("num_attention_heads", "num_key_value_heads", "head_dim")
    f.ignore("attention_head_dim", "num_query_groups", "rms_norm_eps")  # the fields above decide
    if parts["mlp"].bias and "moe" in kinds:
        raise ValueError("config.json: mlp_bias=True is not honoured beside experts")
    of_time = [kind in ("linear_attention", "full_attention") for kind in kinds]
    return decoder(
        f,
        dim,
        [parts[kind] if over_time else None for kind, over_time in zip(kinds, of_time)],
        [None if over_time else parts[kind] for kind, over_time in zip(kinds, of_time)],
        {
            MambaSSD.Config: partial(mamba_rows, bias=conv_bias),
            GQA.Config: partial(attention_rows, name="mixer."),
            SquaredReLU.Config: _mlp_rows,
            MoEV2.Config: _moe_rows,
        },
        [{"mixer_norm" if over_time else "ffn_norm": "norm"} for over_time in of_time],
        names=NAMES,
        eps=("layer_norm_epsilon", 1e-5),
        skipped=r"mtp\..*",
    )


def write(m: Ours) -> dict[str, Any]:
    classes = {cls.Config: kind for kind, cls in KINDS.items()}
    kinds = [classes.get(type(mixer or ffn)) for mixer, ffn in zip(m.mixers, m.ffns)]
    record = {"architectures": ["NemotronHForCausalLM"], "layers_block_type": kinds}
    record |= decoder_fields(m, "layer_norm_epsilon")
    del record["num_hidden_layers"]  # as many as there are kinds
    if "linear_attention" in kinds:
        record |= mamba_fields(m, MAMBA) | {"time_step_min": sum(m.first(MambaSSD).config.limits[:1], 0.0)}
    if "full_attention" in kinds:
        record |= attention_fields(m)
    if "mlp" in kinds:
        mlp = m.first(SquaredReLU)
        record |= {"intermediate_size": mlp.wi.out_features, "mlp_bias": mlp.config.bias}
    if "moe" in kinds:
        moe = m.first(MoEV2)
        c = moe.config
        record |= {
            "moe_intermediate_size": moe.experts.wo.shape[1],
            "n_routed_experts": c.experts,
            "num_experts_per_tok": c.active,
            "norm_topk_prob": c.normalize,
            "moe_shared_expert_intermediate_size": c.shared,
            "n_group": c.groups,
            "topk_group": c.best_groups,
            "routed_scaling_factor": c.scale,
            "moe_latent_size": c.latent or None,
        }
    return record
