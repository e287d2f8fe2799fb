"""Random tiny checkpoints of every Hugging Face model type, made by transformers; the caller draws their shape."""

import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {"original_max_position_embeddings": 256, "factor": 4.0},
}


def rope(pick: random.Random, head_dim: int, *names: str, partial: float | None = None) -> dict:
    """`rope_parameters` of one of the named kinds, of any if none is."""
    name = pick.choice(names or tuple(ROPES))
    turned = int(head_dim * (partial or 1))
    parameters = {"rope_type": name, "rope_theta": pick.choice([1e4, 5e5]), **ROPES[name]}
    if partial:
        parameters["partial_rotary_factor"] = partial
    if name == "longrope":
        for key in ("short_factor", "long_factor"):
            parameters[key] = [pick.uniform(1, 4) for _ in range(turned // 2)]
    return parameters


def shape(pick: random.Random, layers: tuple[int, ...] = (1, 2), square: bool = False, norm: str = "rms_norm_eps"):
    """What all types with attention have; square: hidden_size is heads * head_dim."""
    kv_heads, group, head_dim = pick.choice([1, 2]), pick.choice([1, 2, 4]), pick.choice([8, 16])
    wide = kv_heads * group * head_dim
    return {
        "vocab_size": 101,
        "hidden_size": wide if square else pick.choice([wide, 48]),
        "intermediate_size": 72,
        "num_hidden_layers": pick.choice(layers),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        norm: pick.choice([1e-5, 1e-6]),
        "tie_word_embeddings": pick.random() < 0.5,
        "rope_parameters": rope(pick, head_dim),
    }


def kinds(pick: random.Random, layers: int, *names: str) -> list[str]:
    return [pick.choice(names) for _ in range(layers)]


def _llama(pick):
    return shape(pick) | {"attention_bias": pick.random() < 0.5, "mlp_bias": pick.random() < 0.5}


def _mistral(pick):
    return shape(pick) | {"sliding_window": pick.choice([None, 3, 10])}


def _windowed(pick, **options):
    c = shape(pick, (2, 3)) | {"use_sliding_window": True, "sliding_window": pick.choice([3, 10])} | options
    return c | {"layer_types": kinds(pick, c["num_hidden_layers"], "sliding_attention", "full_attention")}


def _qwen3(pick):
    return _windowed(pick, attention_bias=pick.random() < 0.5)


def _phi3(pick):
    c = shape(pick, square=True) | {"sliding_window": pick.choice([None, 5]), "pad_token_id": None}
    fraction = pick.choice([1.0, 0.5])
    parameters = rope(pick, c["head_dim"], "default", "longrope", partial=fraction)
    return c | {"rope_parameters": parameters, "original_max_position_embeddings": 256}


def _smollm3(pick):
    c = _windowed(pick, pad_token_id=None, attention_bias=pick.random() < 0.5, mlp_bias=pick.random() < 0.5)
    return c | {"no_rope_layers": kinds(pick, c["num_hidden_layers"], 0, 1)}


def _gemma2(pick):
    c = shape(pick, (2, 3)) | {
        "sliding_window": pick.choice([3, 10]),
        "query_pre_attn_scalar": pick.choice([5, 16]),
        "attn_logit_softcapping": pick.choice([None, 0.7]),
        "final_logit_softcapping": pick.choice([None, 0.4]),
        "attention_bias": pick.random() < 0.5,
        "rope_parameters": rope(pick, 8, "default", "linear"),
    }
    wide = c["num_attention_heads"] * 16
    return c | {"hidden_size": wide, "layer_types": kinds(pick, c["num_hidden_layers"], *FULL_OR_NOT)}


FULL_OR_NOT = ("sliding_attention", "full_attention")


def _cohere2(pick):
    c = shape(pick, (2, 3), square=True, norm="layer_norm_eps") | {
        "sliding_window": pick.choice([3, 10]),
        "logit_scale": pick.uniform(0.1, 2),
        "attention_bias": pick.random() < 0.5,
    }
    return c | {"layer_types": kinds(pick, c["num_hidden_layers"], *FULL_OR_NOT)}


def _ssd(pick, heads, head_dim, groups, state, conv):
    values = 8, pick.choice([4, 8]), pick.choice([1, 2]), pick.choice([4, 16]), pick.choice([2, 4])
    return dict(zip((heads, head_dim, groups, state, conv), values)) | {"chunk_size": 16}


def _mamba2(pick):
    c = _ssd(pick, "num_heads", "head_dim", "n_groups", "state_size", "conv_kernel")
    expand = pick.choice([1, 2])
    return c | {
        "vocab_size": 101,
        "hidden_size": 8 * c["head_dim"] // expand,
        "expand": expand,
        "num_hidden_layers": pick.choice([1, 2]),
        "layer_norm_epsilon": pick.choice([1e-5, 1e-6]),
        "use_conv_bias": pick.random() < 0.5,
        "tie_word_embeddings": pick.random() < 0.5,
    }


def _nemotron_h(pick):
    c = shape(pick, norm="layer_norm_epsilon") | {"tie_word_embeddings": False}
    for name in ("rope_parameters", "num_hidden_layers"):
        del c[name]
    names = ["linear_attention", "full_attention", "mlp", "moe"]
    moe = "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size"
    return (
        c
        | _ssd(pick, "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
        | {
            "layers_block_type": pick.sample(names, pick.choice([2, 4])) + ["full_attention"],
            "use_conv_bias": pick.random() < 0.5,
            "time_step_min": 1e-9,  # transformers has this bound in prefill and not in decoding
            "n_routed_experts": 8,
            "n_group": pick.choice([1, 4]),
            "topk_group": 1,
            "num_experts_per_tok": pick.choice([1, 2]),
            "norm_topk_prob": pick.random() < 0.5,
            "routed_scaling_factor": pick.uniform(0.5, 2),
            **dict(zip(moe, (24, 16, pick.choice([None, 12])))),
        }
    )


def _bitnet(pick):
    return shape(pick, square=True) | {"attention_bias": pick.random() < 0.5}


def _experts(pick, *names: str) -> dict:
    """names: of the fields for experts, and how many of them are active."""
    return dict(zip(names, (pick.choice([2, 4]), pick.choice([1, 2]))))


def _mixtral(pick):
    window = {"sliding_window": pick.choice([None, 3, 10])}
    return shape(pick) | window | _experts(pick, "num_local_experts", "num_experts_per_tok")


def _latent(pick):
    c = shape(pick) | {"moe_intermediate_size": 24, "kv_lora_rank": 12, "v_head_dim": 6, "qk_nope_head_dim": 10}
    del c["head_dim"]
    return c | {
        "num_key_value_heads": c["num_attention_heads"],
        "q_lora_rank": pick.choice([None, 9]),
        "qk_rope_head_dim": pick.choice([4, 8]),
        "routed_scaling_factor": pick.uniform(0.5, 2),
        "pad_token_id": None,
    }


def _deepseek_v3(pick):
    c = _latent(pick)
    yarn = ROPES["yarn"] | {"mscale": pick.choice([0.7, 1.0]), "mscale_all_dim": pick.choice([0.5, 1.0])}
    scaled = pick.choice([{"rope_type": "default"}, {"rope_type": "yarn", **yarn}])
    return c | {
        "rope_parameters": {"rope_theta": 1e4} | scaled,
        "rope_interleave": pick.random() < 0.5,
        "num_hidden_layers": 2,
        "first_k_dense_replace": pick.choice([0, 1]),
        "n_routed_experts": 8,
        "num_experts_per_tok": pick.choice([1, 2]),
        "n_shared_experts": pick.choice([1, 2]),
        "n_group": pick.choice([1, 4]),
        "topk_group": 1,
        "norm_topk_prob": pick.random() < 0.5,
    }


def _kimi_linear(pick):
    c = _latent(pick)
    del c["rope_parameters"], c["tie_word_embeddings"]
    return c | {
        "num_hidden_layers": 2,
        "layer_types": pick.sample(["linear_attention", "full_attention"], 2),
        "mlp_layer_types": [pick.choice(["dense", "sparse"]), "sparse"],
        "num_local_experts": 4,
        "num_experts_per_tok": pick.choice([1, 2]),
        "n_shared_experts": pick.choice([1, 2]),
        "norm_topk_prob": pick.random() < 0.5,
        "linear_head_dim": pick.choice([4, 8]),
        "linear_num_heads": pick.choice([1, 3]),
        "linear_conv_kernel_dim": pick.choice([2, 4]),
    }


def _qwen3_next(pick):
    c = shape(pick) | _experts(pick, "num_experts", "num_experts_per_tok")
    return c | {
        "num_hidden_layers": 2,
        "layer_types": pick.sample(["linear_attention", "full_attention"], 2),
        "attention_bias": pick.random() < 0.5,
        "rope_parameters": rope(pick, c["head_dim"], "default", "linear", partial=pick.choice([0.25, 0.5])),
        "linear_num_key_heads": pick.choice([1, 2]),
        "linear_num_value_heads": pick.choice([2, 4]),
        "linear_key_head_dim": pick.choice([4, 8]),
        "linear_value_head_dim": pick.choice([4, 6]),
        "linear_conv_kernel_dim": pick.choice([2, 4]),
        "mlp_only_layers": pick.choice([[], [0]]),
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "norm_topk_prob": pick.random() < 0.5,
    }


def _diffllama(pick):
    c = shape(pick)
    pairs = {"num_key_value_heads": 2 * c["num_key_value_heads"], "num_attention_heads": 2 * c["num_attention_heads"]}
    return c | pairs | {"attention_bias": pick.random() < 0.5}


def _minimax(pick):
    c = shape(pick, square=True) | _experts(pick, "num_local_experts", "num_experts_per_tok")
    names = [f"{part}_{factor}_factor" for part in ("full_attn", "linear_attn", "mlp") for factor in ("alpha", "beta")]
    types = pick.sample(["linear_attention", "full_attention"], 2) + ["linear_attention"]
    factors = {name: pick.uniform(0.5, 2) for name in names}
    return c | factors | {"num_hidden_layers": 3, "layer_types": types, "block_size": 4}


def _recurrent_gemma(pick):
    c = shape(pick, square=True) | {"num_hidden_layers": 3, "tie_word_embeddings": True, "pad_token_id": None}
    head_dim = c.pop("head_dim")
    return c | {
        "rope_parameters": rope(pick, head_dim, "default", partial=0.5),
        "block_types": pick.sample(["recurrent", "attention"], 2),
        "attention_window_size": pick.choice([3, 10]),
        "attention_bias": pick.random() < 0.5,
        "conv1d_width": pick.choice([2, 4]),
        "logits_soft_cap": 0.5,
    }


def _rwkv(pick):
    return {
        "vocab_size": 101,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "attention_hidden_size": 24,
        "intermediate_size": pick.choice([40, None]),
        "tie_word_embeddings": pick.random() < 0.5,
    }


def _llama4_text(pick):
    c = shape(pick, (2, 3)) | _experts(pick, "num_local_experts", "num_experts_per_tok")
    layers = c["num_hidden_layers"]
    return c | {
        "rope_parameters": rope(pick, c["head_dim"], "default", "linear", "llama3"),
        "no_rope_layers": [1] + kinds(pick, layers - 2, 0, 1) + [0],
        "layer_types": kinds(pick, layers, "chunked_attention", "full_attention"),
        "attention_chunk_size": pick.choice([3, 7, 16]),
        "attn_temperature_tuning": pick.random() < 0.7,
        "floor_scale": pick.choice([4, 9]),
        "attn_scale": pick.uniform(0.1, 1),
        "use_qk_norm": pick.random() < 0.5,
        "attention_bias": pick.random() < 0.5,
        "intermediate_size_mlp": 40,
        "moe_layers": pick.choice([[0], [1], [0, 1]]),
    }


DRAWN = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _windowed,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "gemma2": _gemma2,
    "cohere2": _cohere2,
    "mamba2": _mamba2,
    "nemotron_h": _nemotron_h,
    "bitnet": _bitnet,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "kimi_linear": _kimi_linear,
    "qwen3_next": _qwen3_next,
    "diffllama": _diffllama,
    "minimax": _minimax,
    "recurrent_gemma": _recurrent_gemma,
    "rwkv": _rwkv,
    "llama4_text": _llama4_text,
}


def made(pick: random.Random, kind: str, **fields):
    """A model of transformers, of random weights."""
    config = AutoConfig.for_model(kind, **DRAWN[kind](pick) | {"eos_token_id": None} | fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases say nothing at their initial values
                shift = torch.empty_like(parameter).uniform_(-0.5, 0.5)
                parameter.add_(shift if "norm" in name else shift / 2)
            else:
                parameter.mul_(2)
    return model
