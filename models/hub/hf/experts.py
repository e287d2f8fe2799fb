"""Mixtures of experts of checkpoints: which tensors hold the experts, the router and the shared expert.

Files hold each expert by itself; ours are in one tensor, (experts, inputs, outputs).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.ffn.moe import MoE
from models.ffn.moe_v2 import MoEV2
from models.hub.hf.layout import Row, linear, same


def expert_rows(
    c: MoE.Config,
    name: str = "mlp.",
    into: Sequence[str] = ("gate_proj", "up_proj"),
    out: str = "down_proj",
    router: str = "gate",
) -> list[Row]:
    """Router and experts. into, out: names of an expert's projections."""

    def names(parts: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{name}experts.{e}.{part}.weight" for e in range(c.experts) for part in parts)

    def row(ours: str, parts: Sequence[str]) -> Row:
        def join(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
            each = [tensors[i : i + len(parts)] for i in range(0, len(tensors), len(parts))]
            return [torch.stack([torch.cat(expert).T for expert in each])]

        def split(tensors: list[Tensor]) -> list[Tensor]:
            return [part for expert in tensors[0] for part in expert.T.chunk(len(parts))]

        return Row((ours,), names(parts), join, split)

    return [
        same("ffn.router.weight", f"{name}{router}.weight"),
        row("ffn.experts.wi", into),
        row("ffn.experts.wo", [out]),
    ]


def shared_rows(
    c: MoEV2.Config, dim: int, name: str, into: Sequence[str] = ("gate_proj", "up_proj"), out: str = "down_proj"
) -> list[Row]:
    """The expert that every token passes."""
    rows = linear("ffn.shared.wi", {f"{name}.{part}": c.shared for part in into})
    return rows + linear("ffn.shared.wo", {f"{name}.{out}": dim})
