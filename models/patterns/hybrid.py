"""Hybrid: mixers of any kinds in any ratio, by one pattern string; as it comes 11 of Mamba-2 to one of attention.

    x = x + mixer_l(N(x));  x = x + ffn_l(N(x))      mixer_l, ffn_l: pattern and ffn, repeated over the depth

arXiv 2406.07887 (8 % attention beside Mamba-2), 2504.03624 (Nemotron-H, 92 % and 8 %), 2403.19887 (Jamba). Recurrence
carries most of the sequence in state of fixed size; a few layers that look back exactly are enough for recall. Layers
with one branch (pattern or ffn `none`) give the ratios of published models.
"""

from dataclasses import dataclass

from models.decoder import Decoder


class Hybrid(Decoder):
    @dataclass(frozen=True)
    class Config(Decoder.Config):
        """pattern: '11*mamba_ssd gqa' is 92 % and 8 %; every count and part is free."""

        layers: int = 12
        pattern: str = "11*mamba_ssd gqa"

        @classmethod
        def tiny(cls) -> "Hybrid.Config":
            return cls(vocab=64, dim=64, layers=2, pattern="mamba_ssd gqa")
