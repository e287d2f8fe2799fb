"""Weights held in the form and in the bits that decoding reads fastest; `pack(model, "int4")` and serve as before."""

from models.quant.packed import PackedWeight, pack

__all__ = ["PackedWeight", "pack"]
