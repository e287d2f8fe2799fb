"""Weights held in the form and in the bits that decoding reads fastest; `pack(model, "int4")` and serve as before."""

import torch
from torch import nn

from models.quant.packed import PackedWeight, pack

__all__ = ["PackedWeight", "held", "pack"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def held(model: nn.Module, dtype: str, weights: str) -> nn.Module:
    """`model`, in place, computing in `dtype` (fp32, bf16, "" for as it is), with weights as of `pack`.

    weights "": packed in bf16 on a CPU, where that changes nothing but the time; else plain. ValueError in one line.
    """
    if dtype and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose {', '.join(_DTYPES)}")
    if weights in _DTYPES and dtype and weights != dtype:
        raise ValueError(f"weights={weights} with dtype={dtype}: what is packed without rounding has the dtype")
    if dtype:
        model.to(_DTYPES[dtype])
    parameter = next(model.parameters())
    if not weights and parameter.dtype == torch.bfloat16 and parameter.is_cpu:
        weights = "bf16"
    return pack(model, weights) if weights else model
