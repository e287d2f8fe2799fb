"""Multi-token prediction: small stacks on the model guess further tokens, which teaches it to plan, and drafts for it.

    sequential   h^k_t = stack_k(M_k [N h^(k-1)_t ; N' embedding(t + k)]),   guesses token t + 1 + k
    independent  h^k_t = stack_k(h_t)

arXiv 2412.19437 (DeepSeek-V3, sequential), 2404.19737 (independent). Embedding and head are the model's own. Loss:
weight / depth * sum_k CE_k.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from models.config import at_least
from models.heads.lm import LM
from models.layers import norm
from models.layers.ahead import later, mean, targets_ahead
from models.span import Span
from models.stack import Stack
from models.state import State
from models.stateful import Place


class MTP(LM):
    @dataclass(frozen=True)
    class Config(LM.Config):
        """depth: tokens guessed beyond the next one. pattern, ffn: of the layer that guesses each of them."""

        depth: int = 1
        form: Literal["sequential", "independent"] = "sequential"
        weight: float = 0.3
        pattern: str = "gqa"
        ffn: str = "swiglu"

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, depth=1)
        c = self.config = config
        self.stacks = nn.ModuleList(
            Stack(c.pattern, c.ffn, "norm_placement", place.dim, 1, place.vocab, norm=place.norm, eps=place.eps)
            for _ in range(c.depth)
        )
        if not self.stacks[0].causal:
            raise ValueError(f"mtp.pattern={c.pattern!r}: it would see what it has to guess; choose causal mixers")
        self.norms = nn.ModuleList(norm.make(place.norm, place.dim, place.eps) for _ in range(c.depth))
        if c.form == "sequential":
            self.mixes = nn.ModuleList(nn.Linear(2 * place.dim, place.dim, bias=False) for _ in range(c.depth))
            self.x_norms = nn.ModuleList(norm.make(place.norm, place.dim, place.eps) for _ in range(c.depth))
            self.token_norms = nn.ModuleList(norm.make(place.norm, place.dim, place.eps) for _ in range(c.depth))

    def ahead(self, x_BTD: Tensor, at: Span, depth: int, token_BTD: Tensor) -> Tensor:
        """What guesses the token `depth` + 2 steps later, before the head's norm, (B, T, D).

        x: of the depth before, in the sequential form, else of the model. token: embedding of token t + depth + 1.
        """
        if self.config.form == "sequential":
            both_BTE = torch.cat([self.x_norms[depth](x_BTD), self.token_norms[depth](token_BTD)], -1)
            x_BTD = self.mixes[depth](both_BTE)
        return self.stacks[depth](x_BTD, replace(at, shared=dict(at.shared)))[0]

    def forward(
        self, x_BTD: Tensor, at: Span, state: State | None = None, targets_BT: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        if targets_BT is not None and self.training:
            h_BTD = x_BTD
            for depth in range(self.config.depth):
                token_BTD = later(at.shared["embedding"], at, depth + 1)
                h_BTD = self.ahead(h_BTD if self.config.form == "sequential" else x_BTD, at, depth, token_BTD)
                target_BT = targets_ahead(targets_BT, at, depth + 1)
                loss = mean(super().forward(self.norms[depth](h_BTD), at, None, target_BT)[0], target_BT)
                at.losses.append(self.config.weight / self.config.depth * loss)
                at.log(**{f"mtp_{depth + 1}": loss})
        return super().forward(x_BTD, at, state, targets_BT)

    def drafts(self, x_BTD: Tensor, at: Span, ids_BT: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The likeliest tokens after the last of `ids_BT`, (B, depth) int64.

        x: outputs of the model for a document so far. ids: of each of its tokens the next one, the last of them just
        drawn. embed: ids to embeddings, `Decoder.embed`.
        """
        h_BTD, found = x_BTD, []
        for depth in range(self.config.depth):
            h_BTD = self.ahead(h_BTD if self.config.form == "sequential" else x_BTD, at, depth, embed(ids_BT))
            found.append(super().forward(self.norms[depth](h_BTD[:, -1:]), at)[0].argmax(-1))
            ids_BT = torch.cat([ids_BT[:, 1:], found[-1]], 1)
        return torch.cat(found, 1)
