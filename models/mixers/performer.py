"""Performer: linear attention whose features are random, positive and orthogonal, and estimate the softmax (FAVOR+).

    f(x) = exp(W x - |x|^2 / 2) / sqrt(features),  x = q or k over K^(1/4):   E f(q) . f(k) = exp(q . k / sqrt(K))

arXiv 2009.14794. The rows of W are Gaussian, in blocks of K orthogonal to each other, and drawn once. As in the
authors' code, queries are divided by their largest feature, which cancels, and features get 1e-6 on top; keys are not
divided, as their largest could be one of the future.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import at_least
from models.mixers.linear_transformer import LinearTransformer
from models.stateful import Place


class Performer(LinearTransformer):
    @dataclass(frozen=True)
    class Config(LinearTransformer.Config):
        """features: of a head; the error of the estimate falls with their root."""

        features: int = 256

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        at_least(config, features=1)
        self.size = (config.heads, config.features, self.head_dim + 1)
        self.register_buffer("directions", _directions(config.features, self.head_dim))

    def features(self, q_BTHK: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        q_BTHF, k_BTHF = self._exponent(q_BTHK), self._exponent(k_BTHK)
        largest_BTH1 = q_BTHF.detach().amax(-1, keepdim=True)
        return torch.exp(q_BTHF - largest_BTH1) + 1e-6, torch.exp(k_BTHF) + 1e-6

    def _exponent(self, x_BTHK: Tensor) -> Tensor:
        """W x - |x|^2 / 2, (B, T, H, F)."""
        wide = torch.promote_types(x_BTHK.dtype, torch.float32)
        x_BTHK = x_BTHK.to(wide) * self.head_dim**-0.25
        return x_BTHK @ self.directions.to(wide).T - x_BTHK.square().sum(-1, keepdim=True) / 2


def _directions(count: int, dim: int) -> Tensor:
    """(count, dim): Gaussian vectors, as long as such are, each block of `dim` of them orthogonal."""
    gaussian = torch.randn(-(-count // dim), dim, dim)
    turned, upper = torch.linalg.qr(gaussian)
    turned = turned * upper.diagonal(dim1=1, dim2=2).sign()[:, None]  # else each direction has a side it avoids
    return turned.mT.reshape(-1, dim)[:count] * torch.randn(count, dim).norm(dim=-1, keepdim=True)
