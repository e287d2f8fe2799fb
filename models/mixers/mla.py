"""Multi-head latent attention: keys and values are read from one small latent per token, and only that is cached.

    c_t = RMSNorm(W_c x_t),  r_t = rope(W_r x_t);   k_th = [W_uk,h c_t ; r_t],  v_th = W_uv,h c_t
    absorbed:  q.k = (W_uk^T q_nope) . c + q_rope . r,  and W_uv is applied after the average over c

arXiv 2405.04434 (DeepSeek-V2). Training expands keys and values; with a state the absorbed form reads the latent
itself, as one key-value head of `latent + rope_dim` channels that all query heads share. Rotary pairs are (i, i + K/2).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import kernels
from models.config import at_least, parse_part
from models.layers.norm import RMSNorm
from models.layers.position import Position
from models.span import Span
from models.state import State, TensorSpec, append
from models.stateful import Place, Stateful


class MLA(Stateful):
    family = "attention"
    keeps = trees = True

    @dataclass(frozen=True)
    class Config:
        """latent: width of c. query_latent: of the queries' own, 0: none. nope_dim, rope_dim, value_dim: per head.

        scale: of the scores, 0 means (nope_dim + rope_dim)^-0.5. eps: of the latents' norms, 0 means the stack's.
        """

        heads: int = 4
        latent: int = 32
        query_latent: int = 0
        nope_dim: int = 16
        rope_dim: int = 8
        value_dim: int = 16
        positions: str = "rope"
        scale: float = 0.0
        eps: float = 0.0

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, latent=1, nope_dim=1, rope_dim=2, value_dim=1)
        c = self.config = config
        positions, positions_config = parse_part(c.positions, "position")
        self.positions = positions(positions_config, c.rope_dim, c.heads, place)
        if type(self.positions).query is not Position.query:
            raise ValueError(
                f"mla.positions={c.positions!r}: it scales queries, of which it would see a part; use rope"
            )
        width = c.heads * (c.nope_dim + c.rope_dim)
        if c.query_latent:
            self.wq_down = nn.Linear(place.dim, c.query_latent, bias=False)
            self.q_norm = RMSNorm(c.query_latent, c.eps or place.eps)
        self.wq = nn.Linear(c.query_latent or place.dim, width, bias=False)
        self.wc = nn.Linear(place.dim, c.latent + c.rope_dim, bias=False)
        self.c_norm = RMSNorm(c.latent, c.eps or place.eps)
        self.up = nn.Parameter(torch.randn(c.heads, c.nope_dim + c.value_dim, c.latent) * c.latent**-0.5)
        self.wo = nn.Linear(c.heads * c.value_dim, place.dim, bias=False)

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        return {"latent": TensorSpec((1, self.config.latent + self.config.rope_dim), self.wo.weight.dtype, every=1)}

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        q_BTD = self.wq(self.q_norm(self.wq_down(x_BTD)) if c.query_latent else x_BTD)
        nope_BTHK, rope_BTHK = q_BTD.unflatten(-1, (c.heads, -1)).split([c.nope_dim, c.rope_dim], -1)
        rope_BTHK = self.positions.query(rope_BTHK, at)
        c_BTK, r_BTK = self.wc(x_BTD).split([c.latent, c.rope_dim], -1)
        c_BTK = self.c_norm(c_BTK)
        r_BT1K = self.positions.key(r_BTK[:, :, None], at)
        up_k_HKN, up_v_HVN = self.up.split([c.nope_dim, c.value_dim], 1)
        options = {"scale": c.scale or (c.nope_dim + c.rope_dim) ** -0.5, "slopes_H": self.positions.slopes_H}
        view, state = append(state, at, latent=torch.cat([c_BTK[:, :, None], r_BT1K], -1))
        if state is None:
            k_BTHK = torch.einsum("btn,hkn->bthk", c_BTK, up_k_HKN)
            k_BTHK = torch.cat([k_BTHK, r_BT1K.expand(-1, -1, c.heads, -1)], -1)
            v_BTHV = torch.einsum("btn,hvn->bthv", c_BTK, up_v_HVN)
            view = replace(view, new={"k": k_BTHK, "v": v_BTHV})
            y_BTHV = kernels.attention(torch.cat([nope_BTHK, rope_BTHK], -1), view, **options)
        else:
            q_BTHN = torch.einsum("bthk,hkn->bthn", nope_BTHK, up_k_HKN)
            new, past = ({"k": side["latent"], "v": side["latent"][..., : c.latent]} for side in (view.new, view.past))
            y_BTHN = kernels.attention(torch.cat([q_BTHN, rope_BTHK], -1), replace(view, new=new, past=past), **options)
            y_BTHV = torch.einsum("bthn,hvn->bthv", y_BTHN, up_v_HVN)
        return self.wo(y_BTHV.flatten(2)), state
