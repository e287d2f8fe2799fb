"""Longformer: a token sees its neighbours and a few global tokens; global tokens see, and are seen by, everything.

    y_t = softmax over |j - t| <= window and global j of (q_t . k_j) v_j
    y_g = softmax over all j of (q'_g . k'_j) v'_j  for a global g, with projections of its own

arXiv 2004.05150. With `dynamic` the hidden tokens of each call are global, and with `across` global tokens see other
documents of their row and are seen by them: 2101.00406 (CDLM), which reads sets of related documents. Differs from the
papers: what `models.encoder` says; no dilation; the window of one document never reaches into another.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import at_least
from models.encoder import Encoder
from models.layers.choice import Choice
from models.model import Batch
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class Longformer(Encoder):
    """Global tokens are given as `global_BT` (bool or int64) in a batch, or in the inputs of `predict`."""

    packs = True
    inputs = ("global_BT",)

    @dataclass(frozen=True)
    class Config(Encoder.Config):
        """window: tokens seen on each side. room: for global tokens in a row.

        dynamic: tokens hidden in a call are global in it; in `predict`, mask tokens are. across: global tokens see and
        are seen across documents.
        """

        heads: int = 4
        window: int = 256
        room: int = 128
        dynamic: bool = False
        across: bool = False

        @classmethod
        def tiny(cls) -> "Longformer.Config":
            return cls(vocab=64, dim=64, layers=2, window=4, room=16)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.mixer.equal()

    def mixer(self, place: Place) -> Stateful:
        c = self.config
        return WindowAndGlobal(WindowAndGlobal.Config(c.heads, c.window, c.room, c.across), place)

    def shared(self, batch: Batch, masked_BT: Tensor | None = None) -> dict[str, Tensor]:
        found = super().shared(batch)
        if "global_BT" in found and found["global_BT"].shape != batch["ids_BT"].shape:
            shapes = tuple(found["global_BT"].shape), tuple(batch["ids_BT"].shape)
            raise ValueError(f"global_BT: shape {shapes[0]} differs from ids_BT {shapes[1]}")
        if self.config.dynamic:
            masked_BT = batch["ids_BT"] == self.config.vocab if masked_BT is None else masked_BT
            found["global_BT"] = masked_BT | found["global_BT"].bool() if found else masked_BT
        return found

    def example(self, n: int, seed: int = 0) -> Batch:
        """As of every encoder; the first token of each row is global."""
        batch = super().example(n, seed)
        return batch | {"global_BT": torch.arange(32).expand(n, -1) == 0}


class WindowAndGlobal(Stateful):
    """Tokens of `at.shared["global_BT"]` are global; without it none are, and their projections are not used."""

    family = "attention"
    causal = False

    @dataclass(frozen=True)
    class Config:
        """As of the encoder."""

        heads: int
        window: int
        room: int
        across: bool

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, window=1, room=1)
        if place.dim % config.heads:
            raise ValueError(f"longformer: dim={place.dim} must be a multiple of heads={config.heads}")
        self.config = config
        self.wqkv = nn.Linear(place.dim, 3 * place.dim)
        self.wq_global, self.wkv_global = nn.Linear(place.dim, place.dim), nn.Linear(place.dim, 2 * place.dim)
        self.wo = nn.Linear(place.dim, place.dim)
        self.choice = Choice()

    @torch.no_grad()
    def equal(self) -> None:
        """Global projections begin as the others, as in the paper, whose model knew no global tokens before."""
        dim = self.wq_global.out_features
        for kind in ("weight", "bias"):
            whole = getattr(self.wqkv, kind)
            getattr(self.wq_global, kind).copy_(whole[:dim])
            getattr(self.wkv_global, kind).copy_(whole[dim:])

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = self.wqkv(x_BTD).unflatten(-1, (3, self.config.heads, -1)).unbind(2)  # (B, T, H, K) each
        segments_BT = torch.zeros_like(at.positions_BT) if at.segments_BT is None else at.segments_BT
        if "global_BT" not in at.shared:
            scores, values = self.near(q, k, v, segments_BT, torch.zeros_like(segments_BT, dtype=torch.bool))
            return self.wo(self.weigh(scores, values)[:, : x_BTD.shape[1]].flatten(2)), state
        global_BT = at.shared["global_BT"].bool() & (segments_BT >= 0)
        index_BG, real_BG = self.globals(global_BT)
        global_BT = torch.zeros_like(global_BT).scatter(1, index_BG, real_BG)
        scores, values = self.near(q, k, v, segments_BT, global_BT)
        chunk, columns = scores.shape[3], scores.shape[2] * scores.shape[3]
        far = torch.einsum("bthk,bghk->bhtg", wide(q), wide(take(k, index_BG))) * q.shape[-1] ** -0.5
        seen_BTG = self.reads(segments_BT, segments_BT.gather(1, index_BG)) & real_BG[:, None]
        far = F.pad(far.masked_fill(~seen_BTG[:, None], -torch.inf), (0, 0, 0, columns - far.shape[2]))
        far = far.unflatten(2, (-1, chunk))
        y_BTHK = self.weigh(scores, values, far, take(v, index_BG))[:, : x_BTD.shape[1]]
        y_BTD = y_BTHK.flatten(2)
        index_BGD = index_BG[..., None].expand(-1, -1, y_BTD.shape[2])
        told_BGD = torch.where(
            real_BG[..., None], self.overview(x_BTD, index_BG, segments_BT), y_BTD.gather(1, index_BGD)
        )
        return self.wo(y_BTD.scatter(1, index_BGD, told_BGD)), state

    def globals(self, global_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (B, G) of the global tokens first, and which of these are global. On a GPU, which would have to be
        waited for, more than there is room for are no error: the first ones are global."""
        room = min(self.config.room, global_BT.shape[1])
        if not torch.compiler.is_compiling() and global_BT.device.type == "cpu":
            most = int(global_BT.sum(1).max())
            if most > room:
                raise ValueError(f"a row has {most} global tokens, room={self.config.room}: raise room")
        index_BG = self.choice(global_BT.float(), room)
        return index_BG, global_BT.gather(1, index_BG)

    def reads(self, segments_BT: Tensor, segments_BS: Tensor) -> Tensor:
        """Which tokens S a token T reads when one of them is global, (B, T, S)."""
        if self.config.across:
            return ((segments_BT >= 0)[..., None]) & (segments_BS >= 0)[:, None]
        return (segments_BT[..., None] == segments_BS[:, None]) & (segments_BS >= 0)[:, None]

    def near(self, q: Tensor, k: Tensor, v: Tensor, segments_BT: Tensor, global_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, N, c, 3c) fp32 of N chunks of c tokens on themselves and a chunk each side, and what values
        (B, N, 3c, H, K) they are of. Global tokens are left out: they are read from everywhere."""
        tokens = q.shape[1]
        chunk = min(self.config.window, tokens)
        more = -tokens % chunk

        def around(x: Tensor, fill: int = 0) -> Tensor:
            """(B, T, ...) as (B, N, 3c, ...)."""
            sides = (0, 0) * (x.dim() - 2) + (chunk, chunk + more)
            return F.pad(x, sides, value=fill).unfold(1, 3 * chunk, chunk).movedim(-1, 2)

        own_BNc = F.pad(segments_BT, (0, more), value=-1).unflatten(1, (-1, chunk))
        q_BNcHK = F.pad(q, (0, 0, 0, 0, 0, more)).unflatten(1, (-1, chunk))
        reads = own_BNc[..., None] == around(segments_BT, -1)[:, :, None]
        reads = reads & ~around(global_BT.long())[:, :, None].bool()
        row_c, column_s = torch.arange(chunk, device=q.device), torch.arange(3 * chunk, device=q.device) - chunk
        distance_cS = (column_s - row_c[:, None]).abs()
        reads = reads & (distance_cS <= self.config.window) & (own_BNc >= 0)[..., None]
        reads = reads | ((own_BNc < 0)[..., None] & (distance_cS == 0))  # padding reads itself: no row is empty
        scores = torch.einsum("bnchk,bnshk->bhncs", wide(q_BNcHK), wide(around(k))) * q.shape[-1] ** -0.5
        return scores.masked_fill(~reads[:, None], -torch.inf), around(v)

    def weigh(self, scores: Tensor, v: Tensor, far: Tensor | None = None, far_v: Tensor | None = None) -> Tensor:
        """Values weighed by one softmax over near and far scores, (B, N c, H, K)."""
        both = scores if far is None else torch.cat([scores, far], -1)
        weights = both.softmax(-1).to(v.dtype)
        y = torch.einsum("bhncs,bnshk->bnchk", weights[..., : scores.shape[-1]], v)
        if far_v is not None:
            y = y + torch.einsum("bhncg,bghk->bnchk", weights[..., scores.shape[-1] :], far_v)
        return y.flatten(1, 2)

    def overview(self, x_BTD: Tensor, index_BG: Tensor, segments_BT: Tensor) -> Tensor:
        """What global tokens read of everything, (B, G, D)."""
        q, (k, v) = self.wq_global(take(x_BTD, index_BG)), self.wkv_global(x_BTD).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for part in (q, k, v))
        reads_BGT = self.reads(segments_BT.gather(1, index_BG), segments_BT)
        padding_BG1 = (segments_BT.gather(1, index_BG) < 0)[..., None]
        mask_BGT = reads_BGT | padding_BG1  # no row is empty; these are not used
        y = F.scaled_dot_product_attention(q, k, v, mask_BGT[:, None])
        return y.transpose(1, 2).flatten(2)


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take(x: Tensor, index_BG: Tensor) -> Tensor:
    """Columns of x (B, T, ...) as (B, G, ...)."""
    return x.gather(1, index_BG.view(*index_BG.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
