"""Llama: a decoder of gqa and swiglu."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.config import parse_part, to_text
from models.decoder import Decoder
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
    dim, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    trained = fields.whole("max_position_embeddings", 2048)
    head_dim, bias = fields.whole("head_dim", dim // heads), fields.flag("attention_bias", False)
    mixer = GQA.Config(
        heads=heads,
        kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=0 if head_dim * heads == dim else head_dim,
        positions=rope.read(fields, trained),
        bias=bias,
        out_bias=bias,
    )
    ffn = SwiGLU.Config(hidden=fields.whole("intermediate_size"), bias=fields.flag("mlp_bias", False))
    fields.only("hidden_act", "silu")
    fields.only("pretraining_tp", 1)
    config = DecoderOnly.Config(
        vocab=fields.whole("vocab_size"),
        dim=dim,
        layers=fields.whole("num_hidden_layers"),
        pattern=to_text(mixer),
        ffn=to_text(ffn),
        eps=fields.number("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings", False),
    )
    return config, weights(config, tensors, shapes(dim, mixer, head_dim, ffn, ffn.hidden))


def shapes(dim: int, mixer: GQA.Config, head_dim: int, ffn: SwiGLU.Config, hidden: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of one layer of theirs, and its shape."""
    query, key = mixer.heads * head_dim, mixer.kv_heads * head_dim
    sizes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (dim,), "post_attention_layernorm.weight": (dim,)}
    attention = {"q_proj": (query, dim), "k_proj": (key, dim), "v_proj": (key, dim), "o_proj": (dim, query)}
    mlp = {"gate_proj": (hidden, dim), "up_proj": (hidden, dim), "down_proj": (dim, hidden)}
    for part, linears, bias in (("self_attn", attention, mixer.bias), ("mlp", mlp, ffn.bias)):
        for name, (outputs, inputs) in linears.items():
            sizes[f"{part}.{name}.weight"] = (outputs, inputs)
            if bias:
                sizes[f"{part}.{name}.bias"] = (outputs,)
    return sizes


def weights(
    config: DecoderOnly.Config, tensors: dict[str, Tensor], sizes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Ours by name; `sizes`: shapes of a layer. ValueError for a tensor missing, of another shape, or left over."""

    def pop(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        tensor = tensors.pop(name)
        if tensor.shape != shape:  # two wrong ones could stack to the right size
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the config makes {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: quantized checkpoints are not read")
        return tensor

    taken = {
        "embedding.weight": pop("model.embed_tokens.weight", (config.vocab, config.dim)),
        "norm.weight": pop("model.norm.weight", (config.dim,)),
    }
    if config.tied:
        tensors.pop("lm_head.weight", None)
    else:
        taken["head.weight"] = pop("lm_head.weight", (config.vocab, config.dim))
    for layer in range(config.layers):
        for ours, theirs in stacked(sizes):
            taken[f"blocks.{layer}.{ours}"] = torch.cat([pop(f"model.layers.{layer}.{n}", sizes[n]) for n in theirs])
    left = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise ValueError(f"{left[0]}: this weight has no place in the model")
    return taken


def stacked(sizes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, list[str]]]:
    """Each tensor of one layer of ours, and those of theirs that it stacks."""
    for ours, theirs in LAYER.items():
        for kind in ("weight", "bias"):
            if f"{theirs[0]}.{kind}" in sizes:
                yield f"{ours}.{kind}", [f"{name}.{kind}" for name in theirs]


def write(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our model to their config and tensors; ValueError says what Llama does not have."""
    if type(model) not in (Decoder, DecoderOnly):  # a subclass has more than its pattern and ffn say
        raise ValueError(f"Llama is a decoder, this is {type(model).__name__}")
    c = model.config
    mixer_class, mixer = parse_part(c.pattern, "mixer")
    ffn_class, ffn = parse_part(c.ffn, "ffn")
    if mixer_class is not GQA or ffn_class is not SwiGLU or c.head != "lm":
        raise ValueError(f"Llama is gqa with swiglu, this is {c.pattern} with {c.ffn}")
    if mixer.window or mixer.qk_norm or mixer.mask != "causal":
        raise ValueError(f"Llama has no window, qk_norm or mask: {c.pattern}")
    head_dim, hidden = model.blocks[0].mixer.head_dim, model.blocks[0].ffn.wo.in_features
    parameters, length = rope.write(mixer.positions, head_dim // 2)
    record = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "intermediate_size": hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": c.eps,
        "rope_parameters": parameters,
        "attention_bias": mixer.bias,
        "mlp_bias": ffn.bias,
        "tie_word_embeddings": c.tied,
    }
    sizes = shapes(c.dim, mixer, head_dim, ffn, hidden)
    places = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    places["head.weight"] = places["embedding.weight"] if c.tied else ["lm_head.weight"]
    rows = {}
    for layer in range(c.layers):
        for name, others in stacked(sizes):
            places[f"blocks.{layer}.{name}"] = [f"model.layers.{layer}.{other}" for other in others]
            rows[f"blocks.{layer}.{name}"] = [sizes[other][0] for other in others]
    ours, theirs = model.state_dict(), {}
    if odd := sorted(ours.keys() ^ places.keys()):
        raise ValueError(f"{odd[0]} is not a weight of both this model and Llama")
    for name, others in places.items():
        parts = ours[name].split(rows.get(name, len(ours[name])))
        theirs |= dict(zip(others, parts, strict=True))
    return record, theirs
