"""Decoder-only transformer as everybody builds it: GQA with RoPE, SwiGLU, RMSNorm before each branch.

    x = x + gqa(norm(x));  x = x + swiglu(norm(x))

arXiv 2302.13971 (Llama). Loads and writes Hugging Face's Llama checkpoints.
"""

from dataclasses import dataclass

from models.decoder import Decoder


class DecoderOnly(Decoder):
    @dataclass(frozen=True)
    class Config(Decoder.Config):
        """The decoder's own defaults are this pattern."""
