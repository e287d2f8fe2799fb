"""What most model types share: attention, gated ffns, and the frame of a decoder around them, in both directions.

`*_fields` of a model are the config fields that the reader of the same name takes. `ROWS` says under which names a
part's tensors are usually found; a type passes its own where they differ.
"""

from collections.abc import Callable, Sequence
from typing import Any

from models.decoder import Decoder
from models.ffn.swiglu import SwiGLU
from models.hub.hf.checkpoint import Checkpoint, Ours, tiled
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, linear, same, unpaired
from models.mixers.gqa import GQA

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}  # theirs -> ours
Rows = dict[type, Callable[[Any, int], list[Row]]]  # config class -> rows of its tensors, given the config and dim


def shape(f: Fields) -> tuple[int, int]:
    """Width and layers."""
    return f.whole("hidden_size"), f.whole("num_hidden_layers")


def attention(f: Fields, dim: int, head_dim: int = 0, **options: Any) -> GQA.Config:
    """Heads and their widths. head_dim: where not given, 0 for dim / heads; options: what else the type says."""
    heads = f.whole("num_attention_heads")
    head_dim = f.whole("head_dim", head_dim or dim // heads)
    kv_heads = f.whole("num_key_value_heads", heads)
    return GQA.Config(heads, kv_heads, head_dim=0 if head_dim * heads == dim else head_dim, **options)


def attention_fields(m: Ours) -> dict[str, Any]:
    mixer = m.first(GQA)
    c = mixer.config
    return {"num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": mixer.head_dim}


def attention_rows(
    c: GQA.Config, dim: int, name: str = "self_attn.", norm: Callable[[str, str], Row] = same, paired: bool = False
) -> list[Row]:
    """paired: their rotary pairs are neighbours."""
    head_dim = c.head_dim or dim // c.heads
    sizes = {"q_proj": c.heads * head_dim, "k_proj": c.kv_heads * head_dim, "v_proj": c.kv_heads * head_dim}
    order = None
    if paired:
        order = unpaired(c.heads + 2 * c.kv_heads, head_dim)
        order[-sizes["v_proj"] :] = order[-sizes["v_proj"] :].sort().values
    rows = linear("mixer.wqkv", {name + key: size for key, size in sizes.items()}, c.bias, order)
    rows += linear("mixer.wo", {name + "o_proj": dim}, c.out_bias)
    if c.qk_norm:
        rows += [norm(f"mixer.{part}_norm.weight", f"{name}{part}_norm.weight") for part in "qk"]
    return rows


def windows(f: Fields, layers: int, window: int, absent: Sequence[str]) -> list[int]:
    """The window of each layer by `layer_types`, 0 for none; absent: what they are when not given."""
    kinds = f.kinds("layer_types", layers, ("full_attention", "sliding_attention"), absent)
    if not window and "sliding_attention" in kinds:
        raise ValueError("config.json: layer_types has sliding_attention, but sliding_window is not given")
    return [window * (kind == "sliding_attention") for kind in kinds]


def windows_fields(m: Ours) -> dict[str, Any]:
    found = [c.window for c in m.only(GQA)]
    kinds = ["sliding_attention" if window else "full_attention" for window in found]
    return {"sliding_window": max(found) or 4096, "layer_types": kinds}


def mlp(
    f: Fields, activation: str = "hidden_act", width: str = "intermediate_size", absent: str = "silu", **options: Any
) -> SwiGLU.Config:
    """A gated ffn; activation, width: names of the fields; absent: the activation where none is given."""
    name = f.take(activation, absent)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"config.json: {activation}={name!r} is not honoured; it can be {' or '.join(ACTIVATIONS)}")
    return SwiGLU.Config(hidden=f.whole(width), activation=ACTIVATIONS[name], **options)


def mlp_fields(m: Ours, activation: str = "hidden_act", width: str = "intermediate_size") -> dict[str, Any]:
    ffn = m.first(SwiGLU)
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {width: ffn.wo.in_features, activation: theirs[ffn.config.activation]}


def silu_mlp(f: Fields, width: str = "intermediate_size") -> SwiGLU.Config:
    """`mlp` of a type whose experts have the same activation, which can only be silu."""
    f.only("hidden_act", "silu")
    return mlp(f, width=width)


def dense_fields(m: Ours, absent: int) -> dict[str, Any]:
    """`mlp_fields` of a model that may have experts everywhere; absent: the width that is written then."""
    if any(isinstance(ffn, SwiGLU.Config) for ffn in m.ffns):
        return mlp_fields(m)
    return {"intermediate_size": absent, "hidden_act": "silu"}


def mlp_rows(c: SwiGLU.Config, dim: int, name: str = "mlp.") -> list[Row]:
    rows = linear("ffn.wi", {name + "gate_proj": c.hidden, name + "up_proj": c.hidden}, c.bias)
    return rows + linear("ffn.wo", {name + "down_proj": dim}, c.bias)


def capped(name: str, cap: float) -> str:
    """A part with a softcap, as text."""
    return f"{name}(softcap={cap})" if cap else name


ROWS: Rows = {GQA.Config: attention_rows, SwiGLU.Config: mlp_rows}
PRE = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def decoder(
    f: Fields,
    dim: int,
    mixers: Sequence[Any],
    ffns: Sequence[Any],
    rows: Rows | None = None,
    norms: dict[str, str] | Sequence[dict[str, str]] = PRE,
    norm_row: Callable[[str, str], Row] = same,
    names: tuple[str, str, str, str] = ("model.embed_tokens", "model.layers", "model.norm", "lm_head"),
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    tied: bool = False,
    skipped: str = "",
    aliases: dict[str, str] | None = None,
    **options: Any,
) -> Checkpoint:
    """The frame around mixers and ffns, configs layer by layer, None for a branch that is not there.

    rows: of config classes, beside `ROWS`. norms: of a layer (or of each), ours to theirs, read by `norm_row`. names:
    of the embedding, the layers, the last norm and the head. eps: the field and its default. tied: where not given.
    skipped, aliases: as of `Checkpoint`. options: what else the decoder is.
    """
    rows = ROWS | (rows or {})
    tied = f.flag("tie_word_embeddings", tied)
    config = Decoder.Config(
        vocab=f.whole("vocab_size"),
        dim=dim,
        layers=len(mixers),
        pattern=tiled(mixers),
        ffn=tiled(ffns),
        eps=f.number(*eps),
        tied=tied,
        **options,
    )

    def normed(ours: str, theirs: str) -> list[Row]:
        found = [norm_row(f"{ours}.weight", f"{theirs}.weight")]
        return found + [same(f"{ours}.bias", f"{theirs}.bias")] * (config.norm == "layer_bias")

    embedding, layers, last, head = names
    repeated: dict[str, str] = {}
    found = [same("embedding.weight", f"{embedding}.weight"), *normed("norm", last)]
    if tied:
        repeated = {f"{head}.weight": f"{embedding}.weight"}
    else:
        found.append(same("head.weight", f"{head}.weight"))
    for i, (mixer, ffn) in enumerate(zip(mixers, ffns, strict=True)):
        inside = [row for part in (mixer, ffn) if part is not None for row in rows[type(part)](part, dim)]
        for ours, theirs in (norms if isinstance(norms, dict) else norms[i]).items():
            inside += normed(ours, theirs)
        found += [row.within(f"blocks.{i}.", f"{layers}.{i}.") for row in inside]
    return Checkpoint(config, found, skipped, aliases or {}, repeated)


def decoder_fields(m: Ours, eps: str = "rms_norm_eps") -> dict[str, Any]:
    c = m.config
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "num_hidden_layers": c.layers,
        eps: c.eps,
        "tie_word_embeddings": c.tied,
    }
