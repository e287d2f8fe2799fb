"""Manifold-constrained hyper-connections: several residual streams, mixed by matrices that cannot make them grow.

    x = RMSNorm(vec X);  pre = sigmoid(a_1 W_1 x + b_1);  post = 2 sigmoid(a_2 W_2 x + b_2)
    C = sinkhorn(a_3 W_3 x + b_3)
    X = C^T X + post f(N(pre . X))          X (n, D): n streams; for each branch f of a layer

arXiv 2512.24880. C is doubly stochastic: rows and columns add up to 1, so it keeps the streams' mean and has no
singular value above 1. The first layer copies what enters n times, the last returns the mean. As in DeepSeek-V4 the
norm has no weight and Sinkhorn begins with a softmax of rows. Starts from C close to 1, post = 1 and pre = 1/2. One
stream has nothing to mix: it is the residual stream with norms before its branches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Block
from models.config import at_least
from models.layers import norm
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class MHC(Block):
    alone = True

    @dataclass(frozen=True)
    class Config:
        """iterations: of Sinkhorn, each a normalisation of rows and one of columns. eps: in them, and added to pre."""

        streams: int = 4
        iterations: int = 20
        eps: float = 1e-6

        @classmethod
        def tiny(cls) -> "MHC.Config":
            return cls(iterations=4)

    def __init__(self, config: Config, branches: dict[str, Stateful], place: Place) -> None:
        super().__init__(config, branches, place)
        at_least(config, streams=1, iterations=1)
        for name in self.branches:
            self.add_module(f"{name}_norm", norm.make(place.norm, place.dim, place.eps))
            if config.streams > 1:
                self.add_module(f"{name}_streams", Streams(config, place))

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        after, n = {}, self.config.streams
        if n == 1:
            for name in self.branches:
                x_BTD = x_BTD + self.run(name, getattr(self, f"{name}_norm")(x_BTD), at, state, after)
            return x_BTD, None if state is None else after
        if self.place.layer == 0:
            x_BTSD = x_BTD[:, :, None].expand(-1, -1, n, -1)
        else:
            x_BTSD = x_BTD.unflatten(-1, (n, -1))
        for name in self.branches:
            pre_BTS, post_BTS, mix_BTSS = getattr(self, f"{name}_streams")(x_BTSD)
            inner_BTD = (pre_BTS[..., None] * x_BTSD).sum(2).to(x_BTD.dtype)
            y_BTD = self.run(name, getattr(self, f"{name}_norm")(inner_BTD), at, state, after)
            dtype = x_BTD.dtype
            x_BTSD = post_BTS.to(dtype)[..., None] * y_BTD[:, :, None] + mix_BTSS.to(dtype).mT @ x_BTSD
        last = self.place.layer == self.place.layers - 1
        return x_BTSD.mean(2) if last else x_BTSD.flatten(2), None if state is None else after


class Streams(nn.Module):
    """The coefficients of one branch, all from one projection of all streams, in fp32 at least."""

    def __init__(self, config: MHC.Config, place: Place) -> None:
        super().__init__()
        n = self.streams = config.streams
        self.iterations, self.eps, self.norm_eps = config.iterations, config.eps, place.eps
        self.weight = nn.Parameter(torch.randn((2 + n) * n, n * place.dim) * (n * place.dim) ** -0.5)
        self.bias = nn.Parameter(torch.cat([torch.zeros(2 * n), 8 * torch.eye(n).flatten()]))
        self.scale = nn.Parameter(torch.full((3,), 0.01))

    def forward(self, x_BTSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre and post (B, T, S), mix (B, T, S, S): stream i goes into stream j by mix[i, j]."""
        n = self.streams
        wide = torch.promote_types(x_BTSD.dtype, torch.float32)
        x_BTD = x_BTSD.flatten(2).to(wide)
        x_BTD = x_BTD * torch.rsqrt(x_BTD.square().mean(-1, keepdim=True) + self.norm_eps)
        projected = F.linear(x_BTD, self.weight.to(wide)).split([n, n, n * n], -1)
        biases = self.bias.to(wide).split([n, n, n * n])
        pre, post, mix = (a * w + b for a, w, b in zip(self.scale.to(wide), projected, biases, strict=True))
        return pre.sigmoid() + self.eps, 2 * post.sigmoid(), self._sinkhorn(mix.unflatten(-1, (n, n)))

    def _sinkhorn(self, logits: Tensor) -> Tensor:
        """Doubly stochastic, by dividing rows and columns by their sums in turn."""
        mix = logits.softmax(-1) + self.eps
        for _ in range(self.iterations - 1):
            mix = mix / (mix.sum(-2, keepdim=True) + self.eps)
            mix = mix / (mix.sum(-1, keepdim=True) + self.eps)
        return mix / (mix.sum(-2, keepdim=True) + self.eps)
