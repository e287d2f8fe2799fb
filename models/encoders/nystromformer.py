"""Nystromformer: attention through a few landmarks, means of neighbouring queries and keys, so it costs T, not T^2.

    y = S(q k~') S(q~ k~')^+ S(q~ k') v + conv(v),   S the softmax of scaled scores, ~ the landmarks

arXiv 2102.03902. The pseudo-inverse is iterated, Z <- Z (13 - AZ (15 - AZ (7 - AZ))) / 4, six times. Differs from the
paper: a document of no more tokens than landmarks is attended to exactly; one whose length they do not divide has
landmarks of unequal parts; the iteration starts from each row alone, where the paper's code scales all rows of a batch
by one number. What else differs is said in `models.encoder`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import at_least
from models.encoder import Encoder
from models.layers.mlp import Activation
from models.span import Span
from models.state import State
from models.stateful import Place, Stateful


class Nystromformer(Encoder):
    @dataclass(frozen=True)
    class Config(Encoder.Config):
        """landmarks: of a document. kernel: tokens of the convolution, odd, 0 for none. steps: of the inverse."""

        activation: Activation = "gelu_tanh"
        heads: int = 4
        landmarks: int = 64
        kernel: int = 65
        steps: int = 6

        @classmethod
        def tiny(cls) -> "Nystromformer.Config":
            return cls(vocab=64, dim=64, layers=2, landmarks=8, kernel=9)

    def mixer(self, place: Place) -> Stateful:
        c = self.config
        return Nystrom(Nystrom.Config(c.heads, c.landmarks, c.kernel, c.steps), place)


class Nystrom(Stateful):
    family = "attention"
    causal = False

    @dataclass(frozen=True)
    class Config:
        """As of the encoder."""

        heads: int
        landmarks: int
        kernel: int
        steps: int

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        at_least(config, heads=1, landmarks=1, steps=1)
        if place.dim % config.heads:
            raise ValueError(f"nystromformer: dim={place.dim} must be a multiple of heads={config.heads}")
        if config.kernel and config.kernel % 2 == 0:
            raise ValueError(f"nystromformer.kernel={config.kernel}: must be odd, or 0 for no convolution")
        self.config = config
        self.wqkv, self.wo = nn.Linear(place.dim, 3 * place.dim), nn.Linear(place.dim, place.dim)
        if config.kernel:
            self.taps = nn.Parameter(torch.empty(config.heads, config.kernel))
            nn.init.uniform_(self.taps, -(config.kernel**-0.5), config.kernel**-0.5)  # as nn.Conv2d does

    def forward(self, x_BTD: Tensor, at: Span, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.config
        q, k, v = self.wqkv(x_BTD).unflatten(-1, (3, c.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, K) each
        real_BT = at.valid_BT
        if x_BTD.shape[1] <= c.landmarks:
            y_BHTK = F.scaled_dot_product_attention(q, k, v, None if real_BT is None else real_BT[:, None, None])
        else:
            y_BHTK = self.approximate(q, k, v, real_BT)
        if c.kernel:
            y_BHTK = y_BHTK + self.smooth(v if real_BT is None else v * real_BT[:, None, :, None])
        return self.wo(y_BHTK.transpose(1, 2).flatten(2)), state

    def approximate(self, q: Tensor, k: Tensor, v: Tensor, real_BT: Tensor | None) -> Tensor:
        """Attention (B, H, T, K) through landmarks, softmaxes and the inverse in fp32."""
        dtype, root, most = q.dtype, q.shape[-1] ** -0.25, self.config.landmarks
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = q.to(wide) * root, k.to(wide) * root, v.to(wide)
        share_BMT = self.parts(q.shape[2], real_BT, q.device)[:, None].to(wide)
        q_BHMK, k_BHMK = share_BMT @ q, share_BMT @ k
        scores = q_BHMK @ k.mT
        if real_BT is not None:
            scores = scores.masked_fill(~real_BT[:, None, None], -torch.inf)
        values_BHMK = inverse((q_BHMK @ k_BHMK.mT).softmax(-1), self.config.steps) @ (scores.softmax(-1) @ v)
        y_BHTK = (q @ k_BHMK.mT).softmax(-1) @ values_BHMK
        if real_BT is not None:
            mask = real_BT[:, None, None, :most]
            exact = F.scaled_dot_product_attention(q[:, :, :most], k[:, :, :most], v[:, :, :most], mask, scale=1.0)
            short_B = ~real_BT[:, most]
            exact = F.pad(exact, (0, 0, 0, y_BHTK.shape[2] - most))
            y_BHTK = torch.where(short_B[:, None, None, None], exact, y_BHTK)
        return y_BHTK.to(dtype)

    def parts(self, tokens: int, real_BT: Tensor | None, device: torch.device) -> Tensor:
        """How landmarks are means of a row's tokens, (B or 1, M, T)."""
        most = self.config.landmarks
        columns_T, landmarks_M = torch.arange(tokens, device=device), torch.arange(most, device=device)
        count_B1 = columns_T.new_full((1, 1), tokens) if real_BT is None else real_BT.sum(1, keepdim=True)
        of_BT = columns_T * most // count_B1
        member_BMT = (of_BT[:, None] == landmarks_M[:, None]) & (columns_T < count_B1)[:, None]
        return member_BMT / member_BMT.sum(2, keepdim=True).clamp(min=1)

    def smooth(self, v_BHTK: Tensor) -> Tensor:
        """Each head's values convolved over time with taps of its own."""
        size, heads = v_BHTK.shape[3], self.config.heads
        rows_RT = v_BHTK.transpose(2, 3).flatten(1, 2)
        taps = self.taps.repeat_interleave(size, 0)[:, None]
        y_RT = F.conv1d(rows_RT, taps, padding=self.config.kernel // 2, groups=heads * size)
        return y_RT.unflatten(1, (heads, size)).transpose(2, 3)


def inverse(a_BHMM: Tensor, steps: int) -> Tensor:
    """The pseudo-inverse of matrices whose rows sum to one, by `steps` steps of third order."""
    unit = torch.eye(a_BHMM.shape[-1], device=a_BHMM.device, dtype=a_BHMM.dtype)
    z = a_BHMM.mT / a_BHMM.sum(-2).amax((1, 2))[:, None, None, None]
    for _ in range(steps):
        az = a_BHMM @ z
        z = 0.25 * z @ (13 * unit - az @ (15 * unit - az @ (7 * unit - az)))
    return z
