"""Blocks of tokens as single entries: state with one entry for each `stride` tokens, and choices made by its scores.

Block b is the `size` tokens from position b * stride of its document on, size >= stride. It exists once its last token
does: that token computes the entry from the tokens before it, which a window of raw entries (or a whole cache) still
holds, and appends it like any other growing state. So an open block needs no state of its own, rolls back with the
length, and no query sees a block that ends after it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from models.layers.choice import Choice
from models.reading import line, recall
from models.span import Span
from models.state import State, append


@dataclass(frozen=True)
class Blocks:
    """How tokens are cut: `size` of a block, `stride` from one to the next."""

    size: int
    stride: int

    def completed(self, at: Span) -> tuple[Span, Tensor]:
        """The blocks this call completes, as a span to append them at, and the column of each one's last token.

        positions_BT of the span are the blocks' numbers. Columns are (B, M); the segment is -1 where a row completes
        fewer than M.
        """
        ends_BT = at.positions_BT + 1 - self.size
        done_BT = (ends_BT >= 0) & (ends_BT % self.stride == 0)
        segments_BT = torch.zeros_like(ends_BT) if at.segments_BT is None else at.segments_BT
        done_BT = done_BT & (segments_BT >= 0)
        # The carried document completes at most ceil(n / stride) with n tokens, later ones at most n // stride.
        most = done_BT.shape[1] // self.stride + 1
        column_BM = torch.sort((~done_BT).long(), dim=1, stable=True).indices[:, :most]
        done_BM = done_BT.gather(1, column_BM)
        number_BM = (ends_BT.gather(1, column_BM) // self.stride).clamp(min=0)
        segments_BM = torch.where(done_BM, segments_BT.gather(1, column_BM), -1)
        length_B = None if at.length_B is None else self.count(at.length_B)
        return Span(number_BM, segments_BT=segments_BM, length_B=length_B, drafts=at.drafts), column_BM

    def count(self, length_B: Tensor) -> Tensor:
        """Complete blocks of a document of that many tokens."""
        return ((length_B - self.size) // self.stride + 1).clamp(min=0)

    def append(self, state: State | None, at: Span, raw: kernels.View, **entry) -> tuple[kernels.View, State | None]:
        """Add the blocks this call completes; as `models.state.append`.

        entry: name -> (names of raw entries, function of their (B, M, size, *shape) giving (B, M, *shape)).
        """
        span, column_BM = self.completed(at)
        new = {}
        for name, (sources, reduce) in entry.items():
            new[name] = reduce(*(recall(raw, source, column_BM, self.size) for source in sources))
        return append(state, span, **new)

    def sees(self, at: Span, number_BN: Tensor, segments_BN: Tensor) -> Tensor:
        """Which blocks each token may read, those of its document that end with it or before; (B, T, N)."""
        inside_BT = torch.zeros_like(at.positions_BT) if at.segments_BT is None else at.segments_BT
        last_BN = number_BN * self.stride + self.size - 1
        same_BTN = (segments_BN[:, None] == inside_BT[..., None]) & (segments_BN >= 0)[:, None]
        return same_BTN & (last_BN[:, None] <= at.positions_BT[..., None])

    def weights(self, q_BTHK: Tensor, view: kernels.View, name: str, at: Span, scale: float) -> tuple[Tensor, Tensor]:
        """softmax of q . k over the complete blocks, fp32 (B, T, G, H / G, N), and the blocks' numbers (B, N).

        name: of the view's block keys. 0 at blocks that a token does not see, everywhere where it sees none.
        """
        k_BNGK, number_BN, segments_BN = line(view, name)
        sees_BTN = self.sees(at, number_BN, segments_BN)
        logits = products(q_BTHK, k_BNGK) * scale
        return masked_softmax(logits, sees_BTN[:, :, None, None]), number_BN


def products(q_BTHK: Tensor, k_BNGK: Tensor) -> Tensor:
    """q . k in fp32, (B, T, G, H / G, N)."""
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    groups = k_BNGK.shape[2]
    q = q_BTHK.to(wide).unflatten(2, (groups, -1)).permute(0, 2, 1, 3, 4)  # (B, G, T, R, K)
    found = q.flatten(2, 3) @ k_BNGK.to(wide).permute(0, 2, 3, 1)
    return found.unflatten(2, q.shape[2:4]).transpose(1, 2)


def masked_softmax(logits: Tensor, sees: Tensor) -> Tensor:
    """Over the last dimension, 0 where nothing is seen."""
    some = sees.any(-1, keepdim=True)
    return logits.masked_fill(~sees & some, -torch.inf).softmax(-1) * sees


def values(weights: Tensor, v_BNGV: Tensor) -> Tensor:
    """Weighted values (B, T, H, V) by weights (B, T, G, H / G, N)."""
    found = weights.transpose(1, 2).flatten(2, 3) @ v_BNGV.to(weights.dtype).transpose(1, 2)
    return found.unflatten(2, (weights.shape[1], -1)).transpose(1, 2).flatten(2, 3)


def room(view: kernels.View, at: Span, block: int) -> int:
    """Blocks that the longest document a view can show may have."""
    return -(-max(view.capacity, at.positions_BT.shape[1]) // block)


def level(scores: Tensor) -> Tensor:
    """Scores that only rounding tells apart, as their largest: in descending order each is within 32 eps of the next.

    Summaries know no positions, so a text that repeats itself has blocks of equal scores, and rounding would choose
    among them: a token computed alone, in company or as a draft would not read the same ones.
    """
    falling, order = torch.sort(scores, dim=-1, descending=True)
    before, after = falling[..., :-1], falling[..., 1:]
    apart = before - after > 32 * torch.finfo(scores.dtype).eps * before.abs()
    places = torch.arange(scores.shape[-1], device=scores.device)
    first = torch.where(F.pad(apart, (1, 0), value=True), places, 0).cummax(-1).values
    return torch.empty_like(scores).scatter_(-1, order, falling.gather(-1, first))


def pick(choice: Choice, score_BTGJ: Tensor, at: Span, *, block: int, initial: int, local: int, count: int) -> Tensor:
    """The blocks each token reads exactly, (B, T, G, N) int64, -1 for none.

    These are the first `initial`, the last `local` with the token's own, and of the others the `count` of largest
    score, all heads of a group the same.
    """
    here_BT1 = (at.positions_BT // block)[..., None]
    device = score_BTGJ.device
    numbers_J = torch.arange(score_BTGJ.shape[-1], device=device)
    rest_BT1J = ((numbers_J >= initial) & (numbers_J <= here_BT1 - local))[:, :, None]
    # Not -inf: two scores of -inf differ by nan, which no test could tell from a tie.
    open_BTGJ = score_BTGJ.detach().masked_fill(~rest_BT1J, torch.finfo(score_BTGJ.dtype).min)
    chosen_BTGN = choice(level(open_BTGJ), count)
    chosen_BTGN = torch.where(rest_BT1J.expand_as(score_BTGJ).gather(3, chosen_BTGN), chosen_BTGN, -1)
    first_BTN = torch.arange(initial, device=device).expand(*here_BT1.shape[:2], -1)
    near_BTN = (here_BT1 - torch.arange(local, device=device)).clamp(min=-1)
    always_BTN = torch.cat([torch.where(first_BTN <= here_BT1, first_BTN, -1), near_BTN], -1)
    always_BTGN = always_BTN[:, :, None].expand(-1, -1, score_BTGJ.shape[2], -1)
    return torch.cat([always_BTGN, chosen_BTGN], -1)
