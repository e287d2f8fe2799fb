"""Llama 4, the text model: three layers in chunks with RoPE, then a full one without; experts beside a shared one."""

from functools import partial
from typing import Any

from models.config import parse_part, to_text
from models.ffn.moe_v2 import MoEV2
from models.ffn.swiglu import SwiGLU
from models.hub.hf import rope
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.experts import shared_rows
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, constant, same
from models.hub.hf.parts import (
    attention,
    attention_fields,
    attention_rows,
    decoder,
    decoder_fields,
    mlp_rows,
    shape,
    silu_mlp,
)
from models.mixers.chunked_attention import ChunkedAttention
from models.mixers.gqa import GQA
from models.positions.irope import IRoPE

CHUNKED, FULL = "chunked_attention", "full_attention"


def _attention_rows(c: GQA.Config, dim: int) -> list[Row]:
    """Their norm of queries and keys has no weights, and comes after the rotation, which changes no length."""
    return attention_rows(c, dim, norm=lambda ours, theirs: constant(ours, 1.0), paired=True)


def _moe_rows(c: MoEV2.Config, dim: int) -> list[Row]:
    name = "feed_forward."
    return [
        same("ffn.router.weight", f"{name}router.weight"),
        same("ffn.experts.wi", f"{name}experts.gate_up_proj"),
        same("ffn.experts.wo", f"{name}experts.down_proj"),
        *shared_rows(c, dim, f"{name}shared_expert"),
        constant("ffn.bias", 0.0),
    ]


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    positions = rope.read(f, 5e5)
    turned = rope.turned_layers(f, layers)
    kinds = f.kinds("layer_types", layers, (CHUNKED, FULL), [CHUNKED if turns else FULL for turns in turned])
    bias, normed = f.flag("attention_bias", False), f.flag("use_qk_norm", True)
    if normed and positions.startswith(("yarn", "longrope")):
        raise ValueError(f"config.json: use_qk_norm=True is not honoured with {positions}")
    scaled = IRoPE.Config(every=1, floor=f.whole("floor_scale", 8192), sharpness=f.number("attn_scale", 0.1))
    still = to_text(scaled) if f.flag("attn_temperature_tuning", True) else "nope"
    base = attention(f, dim, head_dim=128, bias=bias, out_bias=bias)
    chunk = f.whole("attention_chunk_size", 8192)
    mixers = []
    for kind, turns in zip(kinds, turned):
        options = vars(base) | {"positions": positions if turns else still, "qk_norm": normed and turns}
        mixers.append(ChunkedAttention.Config(**options, chunk=chunk) if kind == CHUNKED else GQA.Config(**options))
    hidden = f.whole("intermediate_size", 8192)
    ffn = silu_mlp(f, "intermediate_size_mlp")
    moe = MoEV2.Config(
        hidden=hidden,
        experts=f.whole("num_local_experts", 16),
        active=f.whole("num_experts_per_tok", 1),
        normalize=False,
        shared=hidden,
        weigh="input",
    )
    step = f.whole("interleave_moe_layer_step", 1)
    sparse = f.wholes("moe_layers", list(range(step - 1, layers, step)))
    f.ignore("for_llm_compressor")
    return decoder(
        f,
        dim,
        mixers,
        [moe if i in sparse else ffn for i in range(layers)],
        {
            GQA.Config: _attention_rows,
            ChunkedAttention.Config: _attention_rows,
            SwiGLU.Config: partial(mlp_rows, name="feed_forward."),
            MoEV2.Config: _moe_rows,
        },
        eps=("rms_norm_eps", 1e-5),
    )


def write(m: Ours) -> dict[str, Any]:
    found = [(c, *parse_part(c.positions, "position")) for c in m.only(GQA)]
    turned = [not (scheme is IRoPE and options.every == 1 or c.positions == "nope") for c, scheme, options in found]
    positions = next((c.positions for c, turns in zip(m.mixers, turned) if turns), "rope")
    tuned = next((options for _, scheme, options in found if scheme is IRoPE), None)
    chunks = [c.chunk for c in m.mixers if isinstance(c, ChunkedAttention.Config)]
    kinds = [CHUNKED if isinstance(c, ChunkedAttention.Config) else FULL for c in m.mixers]
    sparse = [i for i, ffn in enumerate(m.ffns) if isinstance(ffn, MoEV2.Config)]
    record = {
        "architectures": ["Llama4ForCausalLM"],
        **decoder_fields(m),
        **attention_fields(m),
        **rope.write(positions, m.first(GQA).head_dim),
        "attention_bias": m.mixers[0].bias,
        "no_rope_layers": [int(turns) for turns in turned],
        "layer_types": kinds,
        "attention_chunk_size": max(chunks, default=8192),
        "use_qk_norm": any(c.qk_norm for c in m.mixers),
        "attn_temperature_tuning": tuned is not None,
        "moe_layers": sparse,
    }
    if tuned is not None:
        record |= {"floor_scale": tuned.floor, "attn_scale": tuned.sharpness}
    if sparse:
        moe = m.first(MoEV2)
        record |= {"num_local_experts": moe.config.experts, "num_experts_per_tok": moe.config.active}
        record |= {"intermediate_size": moe.experts.wo.shape[1]}
    dense = m.first(SwiGLU).wo.in_features if len(sparse) < len(kinds) else record["intermediate_size"]
    return record | {"intermediate_size_mlp": dense}
