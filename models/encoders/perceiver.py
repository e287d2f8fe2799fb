"""Perceiver: a few learned latents read the whole input and do all the thinking, so that depth costs nothing per token.

    z = z + read(norm(z), norm(x));   z = z + self(norm(z)), L layers, perhaps several times;   h_t = ask(P'_t, norm(z))

arXiv 2107.14795 (Perceiver IO), 2103.03206. Each of the three is attention followed by an MLP; what is asked for is a
position, answered without a residual. Differs from the paper: what `models.encoder` says; tokens beyond a document's
end are not asked for.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import at_least
from models.encoder import Encoder
from models.layers import norm
from models.layers.mlp import MLP
from models.span import Span
from models.stateful import Place


class Perceiver(Encoder):
    @dataclass(frozen=True)
    class Config(Encoder.Config):
        """latents: of a document, latent_dim wide (0: dim). key_dim: of queries and keys, over all heads (0:
        latent_dim). layers: of latents, run `repeats` times with the same weights. hidden: units of their MLPs and of
        the reading one, 0 means latent_dim.
        """

        eps: float = 1e-5
        heads: int = 4
        latents: int = 64
        latent_dim: int = 0
        key_dim: int = 0
        repeats: int = 1

        @classmethod
        def tiny(cls) -> "Perceiver.Config":
            return cls(vocab=64, dim=64, layers=2, latents=16)

    def build(self) -> None:
        c = self.config
        at_least(c, heads=1, latents=1, repeats=1)
        latent = c.latent_dim or c.dim
        keys, hidden = c.key_dim or latent, c.hidden or latent
        for field, size in (("dim", c.dim), ("latent_dim", latent), ("key_dim", keys)):
            if size % c.heads:
                raise ValueError(f"perceiver: {field}={size} must be a multiple of heads={c.heads}")
        self.latents = nn.Parameter(torch.randn(c.latents, latent) * latent**-0.5)
        self.read = Layer(c, latent, c.dim, keys, latent, hidden)
        self.blocks = nn.ModuleList(Layer(c, latent, 0, keys, latent, hidden) for _ in range(c.layers))
        self.asked = nn.Embedding(c.length, c.dim)
        nn.init.normal_(self.asked.weight, std=c.dim**-0.5)
        self.ask = Layer(c, c.dim, latent, keys, c.dim, c.dim, residual=False)

    def embed(self, ids_BT: Tensor, at: Span) -> Tensor:
        return self.embedding(ids_BT) + self.positions(at.positions_BT)

    def encode(self, ids_BT: Tensor, at: Span) -> Tensor:
        mask = None if at.valid_BT is None else at.valid_BT[:, None, None]
        z_BND = self.latents.expand(len(ids_BT), -1, -1)
        z_BND = self.read(z_BND, at, self.embed(ids_BT, at), mask)
        for _ in range(self.config.repeats):
            for layer in self.blocks:
                z_BND = layer(z_BND, at)
        return self.ask(self.asked(at.positions_BT), at, z_BND)

    def tell(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.embedding.weight[:-1], self.bias)


class Layer(nn.Module):
    """Attention of `dim` channels to `source` others (0: to themselves), then an MLP; both read what is normed."""

    def __init__(
        self,
        config: Perceiver.Config,
        dim: int,
        source: int,
        keys: int,
        values: int,
        hidden: int,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.keys, self.residual = config.heads, keys, residual
        self.norm = norm.make("layer_bias", dim, config.eps)
        self.source_norm = norm.make("layer_bias", source, config.eps) if source else nn.Identity()
        self.wq, self.wkv = nn.Linear(dim, keys), nn.Linear(source or dim, keys + values)
        self.wo = nn.Linear(values, dim)
        self.mlp_norm = norm.make("layer_bias", dim, config.eps)
        self.mlp = MLP(MLP.Config(hidden, config.activation), Place(dim))

    def forward(self, x_BTD: Tensor, at: Span, source_BSD: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D), and what it has read of the source (B, S, E), or of itself. mask: (B, 1, 1, S), True is read."""
        normed_BTD = self.norm(x_BTD)
        kv_BSE = self.wkv(normed_BTD if source_BSD is None else self.source_norm(source_BSD))
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.wq(normed_BTD), kv_BSE[..., : self.keys], kv_BSE[..., self.keys :])
        )
        y_BTD = self.wo(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        x_BTD = x_BTD + y_BTD if self.residual else y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), at)[0]
