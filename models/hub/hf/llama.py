"""Llama: a decoder of gqa and swiglu."""

from typing import Any

import torch
from torch import Tensor

from models.config import parse_part, to_text
from models.ffn.swiglu import SwiGLU
from models.hub.hf import rope
from models.hub.hf.fields import Fields
from models.mixers.gqa import GQA
from models.patterns.decoder_only import DecoderOnly

# ours -> theirs, in one layer; several names are stacked along the outputs
LAYER = {
    "mixer_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "mixer.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.wo": ("self_attn.o_proj",),
    "ffn.wi": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.wo": ("mlp.down_proj",),
}


def read(fields: Fields, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Their config and tensors to ours."""
    dim, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    trained = fields.take("max_position_embeddings", 2048)
    head_dim = fields.take("head_dim", dim // heads)
    mixer = GQA.Config(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", heads),
        head_dim=0 if head_dim * heads == dim else head_dim,
        positions=rope.read(fields, trained),
        bias=fields.take("attention_bias", False),
    )
    ffn = SwiGLU.Config(hidden=fields.take("intermediate_size"), bias=fields.take("mlp_bias", False))
    fields.only("hidden_act", "silu")
    fields.only("pretraining_tp", 1)
    config = DecoderOnly.Config(
        vocab=fields.take("vocab_size"),
        dim=dim,
        layers=fields.take("num_hidden_layers"),
        pattern=to_text(mixer),
        ffn=to_text(ffn),
        eps=float(fields.take("rms_norm_eps", 1e-6)),
        tied=fields.take("tie_word_embeddings", False),
    )
    return config, weights(config, tensors)


def weights(config: DecoderOnly.Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours by name. ValueError for a tensor that is missing or would be left over."""
    taken = {
        "embedding.weight": tensors.pop("model.embed_tokens.weight"),
        "norm.weight": tensors.pop("model.norm.weight"),
    }
    head = tensors.pop("lm_head.weight", None)
    if not config.tied:
        if head is None:
            raise ValueError("lm_head.weight is missing, and tie_word_embeddings is false")
        taken["head.weight"] = head
    for layer in range(config.layers):
        for ours, theirs in LAYER.items():
            for kind in ("weight", "bias"):
                names = [f"model.layers.{layer}.{name}.{kind}" for name in theirs]
                if names[0] in tensors:
                    taken[f"blocks.{layer}.{ours}.{kind}"] = torch.cat([tensors.pop(name) for name in names])
    left = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise ValueError(f"{left[0]}: this weight has no place in the model")
    return taken


def write(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our model to their config and tensors; ValueError says what Llama does not have."""
    c = model.config
    mixer_class, mixer = parse_part(c.pattern, "mixer")
    ffn_class, ffn = parse_part(c.ffn, "ffn")
    if mixer_class is not GQA or ffn_class is not SwiGLU or c.head != "lm":
        raise ValueError(f"Llama is gqa with swiglu, this is {c.pattern} with {c.ffn}")
    if mixer.window or mixer.qk_norm or mixer.mask != "causal":
        raise ValueError(f"Llama has no window, qk_norm or mask: {c.pattern}")
    block = model.blocks[0]
    parameters, length = rope.write(mixer.positions, block.mixer.positions.turned // 2)
    record = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "intermediate_size": block.ffn.wo.in_features,
        "num_hidden_layers": c.layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": block.mixer.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": c.eps,
        "rope_parameters": parameters,
        "attention_bias": mixer.bias,
        "mlp_bias": ffn.bias,
        "tie_word_embeddings": c.tied,
    }
    ours, theirs = model.state_dict(), {}
    theirs["model.embed_tokens.weight"], theirs["model.norm.weight"] = ours["embedding.weight"], ours["norm.weight"]
    if not c.tied:
        theirs["lm_head.weight"] = ours["head.weight"]
    head_dim, hidden = block.mixer.head_dim, block.ffn.wo.in_features
    sizes = {
        "mixer.wqkv": [head_dim * n for n in (mixer.heads, mixer.kv_heads, mixer.kv_heads)],
        "ffn.wi": [hidden, hidden],
    }
    for layer in range(c.layers):
        for name, others in LAYER.items():
            for kind in ("weight", "bias"):
                tensor = ours.get(f"blocks.{layer}.{name}.{kind}")
                if tensor is not None:
                    parts = tensor.split(sizes.get(name, [len(tensor)]))
                    theirs |= {f"model.layers.{layer}.{o}.{kind}": part for o, part in zip(others, parts, strict=True)}
    return record, theirs
