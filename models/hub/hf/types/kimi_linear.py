"""Kimi Linear: three layers of kda, then one of latent attention without positions; experts after the first layer."""

from functools import partial
from typing import Any

from models.ffn.moe_v2 import MoEV2
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.experts import expert_rows, shared_rows
from models.hub.hf.fields import Fields
from models.hub.hf.latent import latent, latent_fields, latent_rows
from models.hub.hf.layout import Row, linear, same, shaped, stacked
from models.hub.hf.parts import decoder, decoder_fields, dense_fields, shape, silu_mlp
from models.mixers.kda import KDA
from models.mixers.mla import MLA

LINEAR, FULL = "linear_attention", "full_attention"


def _kda_rows(c: KDA.Config, dim: int) -> list[Row]:
    wide = c.heads * c.head_dim
    parts = {"q_proj": wide, "k_proj": wide, "v_proj": wide, "f_a_proj": c.head_dim, "g_a_proj": c.head_dim}
    convs = tuple(f"self_attn.{part}_conv1d.weight" for part in "qkv")
    taps = stacked("mixer.conv", dict.fromkeys(convs, wide))
    conv = Row(
        taps.ours,
        convs,
        lambda parts, like: taps.join([part.squeeze(1) for part in parts], like),
        lambda parts: [part.unsqueeze(1) for part in taps.split(parts)],
    )
    return [
        *linear("mixer.wi", {f"self_attn.{name}": rows for name, rows in (parts | {"b_proj": c.heads}).items()}),
        conv,
        same("mixer.wf.weight", "self_attn.f_b_proj.weight"),
        same("mixer.wz.weight", "self_attn.g_b_proj.weight"),
        shaped("mixer.log_decay", "self_attn.A_log", 1, 1, c.heads, 1),
        same("mixer.step_bias", "self_attn.dt_bias"),
        same("mixer.norm.weight", "self_attn.o_norm.weight"),
        same("mixer.wo.weight", "self_attn.o_proj.weight"),
    ]


def _moe_rows(c: MoEV2.Config, dim: int) -> list[Row]:
    name = "block_sparse_moe."
    rows = [*expert_rows(c, name, ("w1", "w3"), "w2"), *shared_rows(c, dim, f"{name}shared_experts")]
    return [*rows, same("ffn.bias", f"{name}gate.e_score_correction_bias")]


def _linear(f: Fields, layers: int) -> tuple[KDA.Config, list[str]]:
    """kda, and which layers are: from fields of the config, or from linear_attn_config, which counts from 1."""
    inside = f.inside("linear_attn_config")
    absent = [FULL if i and i % 4 == 0 else LINEAR for i in range(layers)]
    if inside is None:
        config = KDA.Config(
            heads=f.whole("linear_num_heads", 32),
            head_dim=f.whole("linear_head_dim", 128),
            conv=f.whole("linear_conv_kernel_dim", 4),
        )
    else:
        f.ignore("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        config = KDA.Config(
            heads=inside.whole("num_heads", 32),
            head_dim=inside.whole("head_dim", 128),
            conv=inside.whole("short_conv_kernel_size", 4),
        )
        full = inside.wholes("full_attn_layers")
        inside.ignore("kda_layers")
        inside.finish()
        absent = [FULL if i + 1 in full else LINEAR for i in range(layers)]
    return config, f.kinds("layer_types", layers, (LINEAR, FULL), absent)


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    kda, kinds = _linear(f, layers)
    mla = latent(f, "nope")
    f.ignore("head_dim")  # only for rotary positions
    for name, value in (("pretraining_tp", 1), ("moe_router_activation_func", "sigmoid"), ("use_grouped_topk", True)):
        f.only(name, value)
    f.only("mla_use_nope", True)
    f.only("tie_word_embeddings", False)  # transformers does not tie them
    f.only("moe_layer_freq", 1)
    f.only("num_nextn_predict_layers", 0)
    f.ignore("model_max_length", "rope_theta", "rope_scaling", "rope_parameters")
    hidden = f.whole("moe_intermediate_size", 1024)
    moe = MoEV2.Config(
        hidden=hidden,
        experts=f.whole("num_experts", 256),
        active=f.whole("num_experts_per_token", 8),
        normalize=f.flag("moe_renormalize", True),
        shared=hidden * f.whole("num_shared_experts", 1),
        groups=f.whole("num_expert_group", 1),
        best_groups=f.whole("topk_group", 1),
        scale=f.number("routed_scaling_factor", 2.446),
    )
    ffn = silu_mlp(f)
    dense = f.whole("first_k_dense_replace", 1, low=0)
    absent = ["dense" if i < dense else "sparse" for i in range(layers)]
    ffns = [ffn if kind == "dense" else moe for kind in f.kinds("mlp_layer_types", layers, ("dense", "sparse"), absent)]
    mixers = [kda if kind == LINEAR else mla for kind in kinds]
    rows = {KDA.Config: _kda_rows, MLA.Config: partial(latent_rows, paired=False), MoEV2.Config: _moe_rows}
    names = ("model.layers.{}.block_sparse_moe.", "model.layers.{}.mlp.")  # transformers writes gated ffns so too
    aliases = {names[0].format(i): names[1].format(i) for i, part in enumerate(ffns) if part is ffn}
    return decoder(f, dim, mixers, ffns, rows, eps=("rms_norm_eps", 1e-5), aliases=aliases)


def write(m: Ours) -> dict[str, Any]:
    kda, moe = m.first(KDA), m.first(MoEV2)
    c, hidden = moe.config, moe.experts.wo.shape[1]
    return {
        "architectures": ["KimiLinearForCausalLM"],
        **decoder_fields(m),
        **latent_fields(m),
        **dense_fields(m, hidden),
        "layer_types": [LINEAR if isinstance(mixer, KDA.Config) else FULL for mixer in m.mixers],
        "mlp_layer_types": ["sparse" if isinstance(ffn, MoEV2.Config) else "dense" for ffn in m.ffns],
        "linear_num_heads": kda.config.heads,
        "linear_head_dim": kda.head_dim,
        "linear_conv_kernel_dim": kda.config.conv,
        "moe_intermediate_size": hidden,
        "num_experts": c.experts,
        "num_experts_per_token": c.active,
        "moe_renormalize": c.normalize,
        "num_shared_experts": c.shared // hidden,
        "num_expert_group": c.groups,
        "topk_group": c.best_groups,
        "routed_scaling_factor": c.scale,
        "pad_token_id": None,
    }
