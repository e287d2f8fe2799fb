"""Rotary settings of Hugging Face configs, to a position scheme and back.

Both spellings are read: `rope_parameters` of transformers 5, and `rope_theta` with `rope_scaling` of older files.
"""

import math
from typing import Any

from models.config import parse_part, to_text
from models.hub.hf.fields import Fields
from models.layers.rotary import Rotary
from models.positions.dynamic_ntk import DynamicNTK
from models.positions.llama3_rope import Llama3RoPE
from models.positions.longrope import LongRoPE
from models.positions.rope import RoPE
from models.positions.yarn import YaRN


def read(fields: Fields, theta: float = 10000.0, fraction: float | None = None, original: int | None = None) -> str:
    """The position scheme as text. theta, fraction, original: where none is given; fraction is None where all channels
    must turn. An original_max_position_embeddings beside the rotary parameters is stronger than one in them."""
    trained = fields.whole("max_position_embeddings", 2048)
    parameters = fields.inside("rope_parameters") or fields.inside("rope_scaling") or Fields({}, "rope_parameters")
    found, old = parameters.number("rope_theta", None), fields.number("rope_theta", None)
    if found and old and found != old:
        raise ValueError(f"rope_theta is {old} beside rope_parameters and {found} in them: keep the true one")
    kind = parameters.take("rope_type", None) or parameters.take("type", "default")
    parameters.take("type", None)
    base: dict[str, Any] = {"theta": found or old or theta}
    if fraction is None:
        for place in (fields, parameters):
            place.only("partial_rotary_factor", 1.0)
    else:
        outside = fields.number("partial_rotary_factor", fraction)
        base["fraction"] = parameters.number("partial_rotary_factor", outside)
    outside = fields.whole("original_max_position_embeddings", original)
    config = _read(kind, base, parameters, trained, outside)
    parameters.finish()
    return to_text(config)


def _read(kind: str, base: dict[str, Any], parameters: Fields, trained: int, outside: int | None) -> Any:
    if kind == "default":
        return RoPE.Config(**base)
    if kind == "linear":
        return RoPE.Config(**base, factor=parameters.number("factor"))
    original = outside or parameters.whole("original_max_position_embeddings", trained)
    parameters.ignore("original_max_position_embeddings")
    if kind == "dynamic":
        return DynamicNTK.Config(**base, factor=parameters.number("factor"), original=trained)
    factor = parameters.number("factor", trained / original)
    amplitude = parameters.number("attention_factor", None)
    if kind == "llama3":
        low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
        return Llama3RoPE.Config(**base, factor=factor, original=original, low=low, high=high)
    if kind == "yarn":
        scales = parameters.number("mscale", None), parameters.number("mscale_all_dim", None)
        if amplitude is None and all(scales):
            amplitude = (0.1 * scales[0] * math.log(factor) + 1) / (0.1 * scales[1] * math.log(factor) + 1)
        return YaRN.Config(
            **base,
            factor=factor,
            original=original,
            fast=parameters.number("beta_fast", 32),
            slow=parameters.number("beta_slow", 1),
            amplitude=amplitude or 0.0,
            whole=parameters.flag("truncate", True),
        )
    if kind == "longrope":
        if amplitude is None:
            amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = parameters.numbers("short_factor"), parameters.numbers("long_factor")
        return LongRoPE.Config(**base, short=short, long=long, original=original, amplitude=amplitude)
    raise ValueError(
        f"rope_type={kind!r} is not honoured; it can be default, linear, dynamic, yarn, longrope or llama3"
    )


def sharpening(fields: Fields) -> float:
    """What DeepSeek's attention multiplies its scores with beside what YaRN does to queries and keys; read it first."""
    given = fields.peek("rope_parameters") or fields.peek("rope_scaling")
    parameters = Fields(given if isinstance(given, dict) else {}, "rope_parameters")
    kind = parameters.take("rope_type", None) or parameters.take("type", "default")
    strength, factor = parameters.number("mscale_all_dim", 0.0), parameters.number("factor", 1.0)
    return (0.1 * strength * math.log(factor) + 1) ** 2 if kind != "default" and strength and factor > 1 else 1.0


def turned_layers(fields: Fields, layers: int) -> list[bool]:
    """Which layers turn their heads, by no_rope_layers (1 where they do) or its interval."""
    every = fields.whole("no_rope_layer_interval", 4)
    absent = [int((layer + 1) % every != 0) for layer in range(layers)]
    if fields.peek("no_rope_layers") == []:
        fields.ignore("no_rope_layers")
    return list(map(bool, fields.kinds("no_rope_layers", layers, (0, 1), absent)))


def write(text: str, head_dim: int, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` and max_position_embeddings for a scheme of heads of `head_dim` channels.

    partial: the type lets a fraction of them turn.
    """
    cls, c = parse_part(text, "position")
    if not isinstance(c, Rotary.Config):
        raise ValueError(f"positions {text} have no rope_parameters")
    if c.fraction != 1 and not partial:
        raise ValueError(f"it turns whole heads, not a fraction of them: {text}")
    record, length = _written(cls, c, int(head_dim * c.fraction) // 2)
    fraction = {"partial_rotary_factor": c.fraction} if partial else {}
    return {"rope_parameters": {"rope_theta": c.theta} | fraction | record, "max_position_embeddings": length}


def _written(cls: type, c: Any, pairs: int) -> tuple[dict[str, Any], int]:
    if cls is RoPE:
        return {"rope_type": "default"} if c.factor == 1 else {"rope_type": "linear", "factor": c.factor}, 131072
    if cls is DynamicNTK:
        return {"rope_type": "dynamic", "factor": c.factor}, c.original
    original, length = {"original_max_position_embeddings": c.original}, int(c.original * getattr(c, "factor", 1))
    if cls is LongRoPE:
        short, long = (list(f) * (pairs if len(f) == 1 else 1) for f in (c.short, c.long))
        factors = {"short_factor": short, "long_factor": long, "attention_factor": c.amplitude, "factor": 1.0}
        return {"rope_type": "longrope"} | original | factors, 131072
    if cls is Llama3RoPE:
        kind = {"rope_type": "llama3", "factor": c.factor, "low_freq_factor": c.low, "high_freq_factor": c.high}
        return kind | original, length
    if cls is YaRN:
        kind = {"rope_type": "yarn", "factor": c.factor, "beta_fast": c.fast, "beta_slow": c.slow, "truncate": c.whole}
        return kind | original | ({"attention_factor": c.amplitude} if c.amplitude else {}), length
    raise ValueError(f"no rope_type is {to_text(c)}")
