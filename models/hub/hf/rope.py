"""Rotary settings of Hugging Face configs, to a position scheme and back.

Both spellings are read: `rope_parameters` of transformers 5, and `rope_theta` with `rope_scaling` of older files.
"""

import math
from typing import Any

from models.config import parse_part, to_text
from models.hub.hf.fields import Fields
from models.positions.dynamic_ntk import DynamicNTK
from models.positions.llama3_rope import Llama3RoPE
from models.positions.longrope import LongRoPE
from models.positions.rope import RoPE
from models.positions.yarn import YaRN


def read(fields: Fields, trained: int) -> str:
    """The position scheme as text, for a config whose max_position_embeddings is `trained`."""
    parameters = fields.inside("rope_parameters") or fields.inside("rope_scaling") or Fields({}, "rope_parameters")
    theta, old = parameters.number("rope_theta", None), fields.number("rope_theta", None)
    if theta and old and theta != old:
        raise ValueError(f"rope_theta is {old} beside rope_parameters and {theta} in them: keep the true one")
    kind = parameters.take("rope_type", None) or parameters.take("type", "default")
    parameters.take("type", None)
    for place in (fields, parameters):
        place.only("partial_rotary_factor", 1.0)
    config = _read(kind, {"theta": theta or old or 10000.0}, parameters, trained)
    parameters.finish()
    return to_text(config)


def _read(kind: str, base: dict[str, Any], parameters: Fields, trained: int) -> Any:
    if kind == "default":
        return RoPE.Config(**base)
    if kind == "linear":
        return RoPE.Config(**base, factor=parameters.number("factor"))
    original = parameters.whole("original_max_position_embeddings", trained)
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


def write(text: str, pairs: int) -> tuple[dict[str, Any], int]:
    """`rope_parameters` and max_position_embeddings for a scheme; `pairs` of channels that turn."""
    cls, c = parse_part(text, "position")
    if "theta" not in dir(c):
        raise ValueError(f"positions {text} have no rope_parameters")
    if c.fraction != 1:
        raise ValueError(f"Llama turns whole heads, not a fraction of them: {text}")
    record: dict[str, Any] = {"rope_theta": c.theta}
    if cls is RoPE:
        kind = {"rope_type": "default"} if c.factor == 1 else {"rope_type": "linear", "factor": c.factor}
        return record | kind, 131072
    record["original_max_position_embeddings"] = c.original
    if cls is DynamicNTK:
        return record | {"rope_type": "dynamic", "factor": c.factor}, c.original
    if cls is LongRoPE:
        short, long = (list(f) * (pairs if len(f) == 1 else 1) for f in (c.short, c.long))
        return record | {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": c.amplitude,
            "factor": 1.0,
        }, 131072
    length = int(c.original * c.factor)
    if cls is Llama3RoPE:
        kind = {"rope_type": "llama3", "factor": c.factor, "low_freq_factor": c.low, "high_freq_factor": c.high}
        return record | kind, length
    kind = {"rope_type": "yarn", "factor": c.factor, "beta_fast": c.fast, "beta_slow": c.slow, "truncate": c.whole}
    return record | kind | ({"attention_factor": c.amplitude} if c.amplitude else {}), length
