"""RWKV-4: time mix and channel mix, a norm of the embedding.

transformers halves the stream every few layers against overflow in fp16 (rescale_every), which changes the model only
through the eps of its norms; here nothing is halved.
"""

from dataclasses import replace
from typing import Any

import torch

from models.ffn.channel_mix import ChannelMix
from models.hub.hf.checkpoint import Checkpoint, Ours
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, mapped, same
from models.hub.hf.parts import decoder, decoder_fields, shape
from models.mixers.rwkv import RWKV

NAMES = ("rwkv.embeddings", "rwkv.blocks", "rwkv.ln_out", "head")


def _mixer_rows(c: RWKV.Config, dim: int) -> list[Row]:
    names = {"wk": "key", "wv": "value", "wr": "receptance", "wo": "output"}
    mixes = tuple(f"attention.time_mix_{part}" for part in ("key", "value", "receptance"))
    return [
        *(same(f"mixer.{ours}.weight", f"attention.{theirs}.weight") for ours, theirs in names.items()),
        same("mixer.log_decay", "attention.time_decay"),
        same("mixer.bonus", "attention.time_first"),
        Row(
            ("mixer.mix",),
            mixes,
            lambda parts, like: [torch.cat(parts).view(3, dim)],
            lambda parts: [part.view(1, 1, dim) for part in parts[0]],
        ),
    ]


def _ffn_rows(c: ChannelMix.Config, dim: int) -> list[Row]:
    """Our shares are of the token before, theirs of the token itself."""
    names = {"wi": "key", "wr": "receptance", "wo": "value"}
    mixes = {"mix": "time_mix_key", "mix_r": "time_mix_receptance"}
    rows = [same(f"ffn.{ours}.weight", f"feed_forward.{theirs}.weight") for ours, theirs in names.items()]
    for ours, theirs in mixes.items():
        rows.append(
            mapped(
                f"ffn.{ours}",
                f"feed_forward.{theirs}",
                lambda x: 1 - x.view(dim),
                lambda x: (1 - x).view(1, 1, dim),
            )
        )
    return rows


def read(f: Fields) -> Checkpoint:
    dim, layers = shape(f)
    f.ignore("context_length", "rescale_every", "max_position_embeddings")
    f.only("layer_norm_epsilon", 1e-5)  # the last norm has this one whatever the config says
    mixer = RWKV.Config(f.whole("attention_hidden_size", dim))
    ffn = ChannelMix.Config(f.whole("intermediate_size", 4 * dim), receptance=True)
    norms = {"mixer_norm": "ln1", "ffn_norm": "ln2"}
    found = decoder(
        f,
        dim,
        [mixer] * layers,
        [ffn] * layers,
        {RWKV.Config: _mixer_rows, ChannelMix.Config: _ffn_rows},
        norms,
        names=NAMES,
        eps=("layer_norm_epsilon", 1e-5),
        norm="layer_bias",
        embedding_norm=True,
    )
    entry = [same(f"embedding_norm.{kind}", f"rwkv.blocks.0.pre_ln.{kind}") for kind in ("weight", "bias")]
    return replace(found, rows=found.rows + entry)


def write(m: Ours) -> dict[str, Any]:
    return {
        "architectures": ["RwkvForCausalLM"],
        **decoder_fields(m, "layer_norm_epsilon"),
        "attention_hidden_size": m.first(RWKV).wk.out_features,
        "intermediate_size": m.first(ChannelMix).wi.out_features,
        "rescale_every": 0,
    }
