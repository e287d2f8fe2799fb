"""A cache of fixed size: keys and values in few bits, and of the tokens those that matter.

    x ~ lo + step * code,  code = round((x - lo) / step) in 0 .. 2^bits - 1,  lo and step of 32 channels of a token
    sliding:       the first tokens (sinks) and the last
    heavy_hitter:  the last half, and those of the largest  a_j = sum_t sum_h softmax_j(q_th . k_j scale)  for each head

arXiv 2411.18077 (MiniKV), 2403.17312 (ALISA), 2306.14048 (heavy hitters), 2309.17453 (sinks). A full store drops an
eighth at once: which tokens it holds depends on how many there were and never on how calls were cut, and between two
evictions a call is one attention. Differs from the papers: in MiniKV keys share their scale over tokens, which eviction
would tear apart, and the last tokens stay unquantised; nothing is compressed where there is no state, in training.
Windows and biases by distance count the tokens held, as positions in 2309.17453 do.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels import View
from models.caches.full import Attend, Full
from models.config import at_least
from models.layers.choice import Choice
from models.layers.compressed import masked_softmax, products
from models.span import Span
from models.state import State, TensorSpec, append

CHANNELS = 32  # that share a scale, where they divide a head
SINKS = 4


class KVCompression(Full):
    keeps = trees = False

    @dataclass(frozen=True)
    class Config:
        """budget: tokens held, at least 4. bits: of a number, 16 for the dtype of the weights. policy: who stays."""

        budget: int = 1024
        bits: Literal[16, 8, 4, 2] = 4
        policy: Literal["heavy_hitter", "sliding"] = "heavy_hitter"

        @classmethod
        def tiny(cls) -> "KVCompression.Config":
            return cls(budget=128, bits=16)

    def __init__(self, config: Config, heads: int, size: int, scale: float) -> None:
        super().__init__(config, heads, size, scale)
        at_least(config, budget=4)
        if size * config.bits % 8:
            raise ValueError(f"kv_compression.bits={config.bits}: a head of {size} channels does not fill whole bytes")
        self.scale, self.choice = scale, Choice()
        self.dropped = max(1, config.budget // 8)
        self.left = config.budget - self.dropped
        self.channels = CHANNELS if size % CHANNELS == 0 else size

    def state_spec(self, dtype: torch.dtype, window: int = 0) -> dict[str, TensorSpec]:
        c, (heads, size) = self.config, self.shape
        if c.bits == 16:
            spec = {name: TensorSpec((c.budget, heads, size), dtype) for name in "kv"}
        else:
            code = TensorSpec((c.budget, heads, size * c.bits // 8), torch.uint8)
            scale = TensorSpec((c.budget, heads, size // self.channels, 2), torch.float16)
            spec = {"k": code, "k_scale": scale, "v": code, "v_scale": scale}
        if c.policy == "heavy_hitter":
            spec["weight"] = TensorSpec((c.budget, heads), torch.float32)
        return spec

    def forward(
        self, attend: Attend, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, at: Span, state: State | None
    ) -> tuple[Tensor, State | None]:
        if state is None:
            return attend(q_BTHK, append(None, at, k=k_BTGK, v=v_BTGK)[0]), None
        real_BT = torch.ones_like(at.positions_BT, dtype=torch.bool) if at.segments_BT is None else at.segments_BT >= 0
        since_BT = at.positions_BT - self.config.budget
        turns_BT = real_BT & ((at.positions_BT == 0) | ((since_BT >= 0) & (since_BT % self.dropped == 0)))
        # Runs of tokens between two turns; the first that a call holds is number 0, whether it begins with one or not.
        first_BT = real_BT & (real_BT.long().cumsum(1) == 1)
        run_BT = turns_BT.long().cumsum(1) - (turns_BT & first_BT).sum(1, keepdim=True)
        run_BT = torch.where(real_BT, run_BT, -1)
        y_BTHK = torch.zeros_like(q_BTHK)
        for run, width in enumerate(self._widths(run_BT, at)):
            here_BT = run_BT == run
            column_BN = torch.sort((~here_BT).long(), dim=1, stable=True).indices[:, :width]
            here_BN, turns_BN, position_BN = (x.gather(1, column_BN) for x in (here_BT, turns_BT, at.positions_BT))
            new = (_gather(x, column_BN) for x in (q_BTHK, k_BTGK, v_BTGK))
            y_BNHK, state = self._run(attend, *new, here_BN, turns_BN[:, 0] & here_BN[:, 0], position_BN[:, 0], state)
            y_BNHK = torch.where(here_BN[..., None, None], y_BNHK, _gather(y_BTHK, column_BN))
            y_BTHK = y_BTHK.scatter(1, _beside(column_BN, y_BNHK).expand_as(y_BNHK), y_BNHK)
        return y_BTHK, state

    def _widths(self, run_BT: Tensor, at: Span) -> list[int]:
        """Columns of each run, in the row where it is longest; a compiled call does not know and takes a bound."""
        rows, tokens = run_BT.shape
        if tokens == 1:
            return [1]
        if torch.compiler.is_compiling():
            runs = tokens if at.segments_BT is not None else 1 - (1 - tokens) // self.dropped
            return [min(tokens, self.config.budget)] * runs
        count_BR = run_BT.new_zeros(rows, int(run_BT.max()) + 2).scatter_add_(1, run_BT + 1, torch.ones_like(run_BT))
        return count_BR[:, 1:].amax(0).tolist()

    def _run(
        self,
        attend: Attend,
        q_BNHK: Tensor,
        k_BNGK: Tensor,
        v_BNGK: Tensor,
        here_BN: Tensor,
        turns_B: Tensor,
        position_B: Tensor,
        state: State,
    ) -> tuple[Tensor, State]:
        """Tokens among which nothing is dropped; `here` are real, the others of a row follow them.

        turns: the row drops something, or everything, before its first token, which stands at `position`.
        """
        budget, tokens = self.config.budget, q_BNHK.shape[1]
        drops_B = turns_B & (position_B >= budget)
        if torch.compiler.is_compiling() or drops_B.any():
            state = self._drop(state, drops_B)
        held_B = torch.where(position_B < budget, position_B, self.left + (position_B - budget) % self.dropped)
        places_BN = held_B[:, None] + torch.arange(tokens, device=held_B.device)
        new = self._packed("k", k_BNGK) | self._packed("v", v_BNGK)
        # These tokens, too, are read as they will be remembered, or outputs would depend on where calls were cut.
        seen = {name: self._unpacked(name, new, q_BNHK.dtype) for name in "kv"}
        past = {name: self._unpacked(name, state, q_BNHK.dtype) for name in "kv"}
        y_BNHK = attend(q_BNHK, View(seen, past, held_B, places_BN, here_BN.long() - 1))
        source_BS = torch.arange(budget, device=held_B.device) - held_B[:, None]
        written_BS = (source_BS >= 0) & (source_BS < here_BN.sum(1, keepdim=True))
        source_BS = source_BS.clamp(0, tokens - 1)

        def joined(old: Tensor, entries: Tensor) -> Tensor:
            return torch.where(_beside(written_BS, old), _gather(entries, source_BS).to(old.dtype), old)

        after = {name: joined(state[name], entries) for name, entries in new.items()}
        if "weight" in state:
            with torch.no_grad():
                logits_BNGRS = products(q_BNHK, joined(past["k"], seen["k"])) * self.scale
                sees_BNS = (torch.arange(budget, device=held_B.device) <= places_BN[..., None]) & here_BN[..., None]
                weight_BSG = masked_softmax(logits_BNGRS, sees_BNS[:, :, None, None]).sum((1, 3)).transpose(1, 2)
                after["weight"] = torch.where(written_BS[..., None], 0, state["weight"]) + weight_BSG.float()
        return y_BNHK, after

    def _drop(self, state: State, drops_B: Tensor) -> State:
        """Of the rows that are told to, all of which are full, the slots that stay, in order; then free ones."""
        slots_S = torch.arange(self.config.budget, device=drops_B.device)
        score_BGS = slots_S.float().expand(len(drops_B), self.shape[0], -1)
        always_S = slots_S < min(SINKS, self.left // 4)
        if "weight" in state:
            score_BGS = torch.where(drops_B[:, None, None], state["weight"].transpose(1, 2), score_BGS)
            always_S = slots_S >= self.config.budget - self.left // 2
        score_BGS = score_BGS.masked_fill(always_S, torch.finfo(torch.float32).max)
        stays_BGS = self.choice(score_BGS, self.left).sort(-1).values
        index_BGS = torch.cat([stays_BGS, slots_S[self.left :].expand(*stays_BGS.shape[:2], -1)], 2)
        index_BSG = torch.where(drops_B[:, None, None], index_BGS, slots_S).transpose(1, 2)
        return {name: x.gather(1, _beside(index_BSG, x).expand_as(x)) for name, x in state.items()}

    def _packed(self, name: str, x_BTGK: Tensor) -> State:
        """Entries of a name, as state holds them."""
        if self.config.bits == 16:
            return {name: x_BTGK}
        bits, levels = self.config.bits, (1 << self.config.bits) - 1
        groups = x_BTGK.detach().float().unflatten(-1, (-1, self.channels))
        least, most = groups.aminmax(dim=-1)
        least = least.half()
        step = ((most - least.float()) / levels).half().clamp(min=2**-24)  # what is not 0
        codes = ((groups - least.float()[..., None]) / step.float()[..., None]).round().clamp(0, levels)
        codes = codes.flatten(-2).to(torch.uint8).unflatten(-1, (-1, 8 // bits))
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
        return {name: (codes << shifts).sum(-1, dtype=torch.uint8), f"{name}_scale": torch.stack([least, step], -1)}

    def _unpacked(self, name: str, state: State, dtype: torch.dtype) -> Tensor:
        """The inverse, as near as it comes."""
        if self.config.bits == 16:
            return state[name].to(dtype)
        bits = self.config.bits
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=state[name].device)
        codes = (state[name][..., None] >> shifts & (1 << bits) - 1).flatten(-2)
        least, step = state[f"{name}_scale"].float().unbind(-1)
        groups = codes.float().unflatten(-1, (-1, self.channels))
        return (least[..., None] + step[..., None] * groups).flatten(-2).to(dtype)


def _beside(x: Tensor, entries: Tensor) -> Tensor:
    """x with as many dimensions as entries."""
    return x.view(*x.shape, *[1] * (entries.dim() - x.dim()))


def _gather(entries: Tensor, index_BN: Tensor) -> Tensor:
    """Entries (B, S, ...) at the indices, (B, N, ...)."""
    return entries.gather(1, _beside(index_BN, entries).expand(-1, -1, *entries.shape[2:]))
