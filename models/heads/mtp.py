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
from models.state import State, TensorSpec, prefixed, scope
from models.stateful import Place


class MTP(LM):
    added = ("stacks", "norms", "mixes", "x_norms", "token_norms")

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
        return self._layer(x_BTD, token_BTD, replace(at, shared=dict(at.shared)), depth, None)[0]

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

    # -- drafts --------------------------------------------------------------------------------------------------------

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        """What drafting remembers of a row, so that it costs a layer for each new token.

        length: outputs of the model read so far. Layers' state is prefixed with their depth. before: of a depth that
        reads another, that one's output for the first token it has not taken in, as it knows the next token later.
        """
        spec = {"length": TensorSpec((), torch.int64)}
        for depth, stack in enumerate(self.stacks):
            spec |= prefixed(str(depth), stack.state_spec(max_len))
            if depth and self.config.form == "sequential":
                spec[f"{depth}.before"] = TensorSpec((self.weight.shape[1],), self.weight.dtype)
        return spec

    def draft(
        self,
        x_BTD: Tensor,
        ids_BT: Tensor,
        embed: Callable[[Tensor], Tensor],
        state: State,
        segments_BT: Tensor | None = None,
        choose: Callable[[Tensor, int], Tensor] = lambda logits_BC, depth: logits_BC.argmax(-1),
    ) -> tuple[Tensor, State]:
        """Guesses of the tokens after the last of `ids_BT`, (B, depth) int64, and the state after.

        x: the model's outputs since the last call. ids: of each of these tokens the next one, the last of them just
        drawn. embed: ids to embeddings, `Decoder.embed`. segments: 0, -1 for padding at the end of a row, which has at
        least one token. choose: one token (B,) of the logits (B, C) of a depth.
        """
        rows, tokens = ids_BT.shape
        new_B = ids_BT.new_full((rows,), tokens) if segments_BT is None else (segments_BT >= 0).sum(1)
        last_B = (torch.arange(rows, device=new_B.device), new_B - 1)
        length_B, sequential = state["length"], self.config.form == "sequential"
        token_BTD = embed(ids_BT) if sequential else None
        after, found, h_BTD, guess_BKD = {"length": length_B + new_B}, [], x_BTD, x_BTD[:, :0]
        for depth in range(self.config.depth):
            behind = depth if sequential else 0  # a depth stands so many tokens behind the model
            part, before_BD = scope(state, str(depth)), None
            if sequential and depth:
                end_B1D = h_BTD[last_B][:, None]
                before_BD = part.pop("before")
                after[f"{depth}.before"] = end_B1D[:, 0].to(before_BD.dtype)
                h_BTD, lead_BKD = torch.cat([before_BD[:, None], h_BTD[:, :-1]], 1), torch.cat([end_B1D, guess_BKD], 1)
            known_B = (length_B - behind).clamp(min=0)
            positions_BT = (length_B - behind)[:, None] + torch.arange(tokens, device=new_B.device)
            at = _span(positions_BT, known_B, segments_BT, behind)
            h_BTD, part = self._layer(h_BTD if sequential else x_BTD, token_BTD, at, depth, part)
            after |= prefixed(str(depth), part)
            end_BD = h_BTD[last_B]
            if behind:  # past what is known on its own guesses; what that leaves in the state lies past its length
                known_B = (length_B + new_B - behind).clamp(min=0)
                positions_BK = (length_B + new_B - behind)[:, None] + torch.arange(behind, device=new_B.device)
                guessed_BKD = embed(torch.stack(found, 1))
                guess_BKD, _ = self._layer(
                    lead_BKD, guessed_BKD, _span(positions_BK, known_B, None, behind), depth, part
                )
                end_BD = guess_BKD[:, -1]
            logits_BC = super().forward(self.norms[depth](end_BD[:, None]), at)[0][:, 0]
            found.append(choose(logits_BC, depth))
        return torch.stack(found, 1), after

    def _layer(
        self, x_BTD: Tensor, token_BTD: Tensor | None, at: Span, depth: int, state: State | None
    ) -> tuple[Tensor, State | None]:
        if self.config.form == "sequential":
            both_BTE = torch.cat([self.x_norms[depth](x_BTD), self.token_norms[depth](token_BTD)], -1)
            x_BTD = self.mixes[depth](both_BTE)
        return self.stacks[depth](x_BTD, at, state)


def _span(positions_BT: Tensor, length_B: Tensor, segments_BT: Tensor | None, behind: int) -> Span:
    """Tokens that continue a row, but for those that would stand before its first one."""
    if behind:
        segments_BT = torch.zeros_like(positions_BT) if segments_BT is None else segments_BT
        segments_BT = torch.where(positions_BT < 0, -1, segments_BT)
    return Span(positions_BT.clamp(min=0), segments_BT=segments_BT, length_B=length_B)
