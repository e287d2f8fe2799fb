"""The cells of ParaRNN: what a step makes of a state (K, ..., D), its slopes, and gradients with those.

Weights are one number per channel, so a step's Jacobian is K by K for each channel. Both cells mix old and new in
proportions that add up to one, so no state grows beyond 1 or where it started.
"""

import torch
from torch import Tensor


class Gru:
    """State h. z = sigmoid(a_z h + x_z), r likewise, c = tanh(a_c r h + x_c); h' = (1 - z) h + z c."""

    states, weights = 1, 3

    @staticmethod
    def step(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        """x (3, ..., D), w (3, D), s (1, ..., D) -> the next state."""
        h = s[0]
        z, r = (w[0] * h + x[0]).sigmoid(), (w[1] * h + x[1]).sigmoid()
        c = (w[2] * r * h + x[2]).tanh()
        return (h + z * (c - h))[None]

    @staticmethod
    def slopes(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next state, its Jacobian (1, 1, ..., D), and its slopes by x (3, 1, ..., D)."""
        h = s[0]
        z, r = (w[0] * h + x[0]).sigmoid(), (w[1] * h + x[1]).sigmoid()
        c = (w[2] * r * h + x[2]).tanh()
        by_z, by_c = (c - h) * z * (1 - z), z * (1 - c * c)
        by_r = by_c * w[2] * h * r * (1 - r)
        jacobian = 1 - z + w[0] * by_z + w[1] * by_r + w[2] * r * by_c
        return (h + z * (c - h))[None], jacobian[None, None], torch.stack([by_z, by_r, by_c])[:, None]

    @staticmethod
    def weight_slopes(x: Tensor, w: Tensor, s: Tensor, by_x: Tensor) -> tuple[Tensor, ...]:
        """What each weight multiplies, through what x it acts: pairs (factor, place in x)."""
        h = s[0]
        return (h, 0), (h, 1), ((w[1] * h + x[1]).sigmoid() * h, 2)


class Lstm:
    """State c, h. f = sigmoid(a_f h + p_f c + x_f), c' = f c + (1 - f) tanh(a_c h + x_c),

    o = sigmoid(a_o h + p_o c' + x_o), h' = o tanh(c'); the weights in the order a_f, a_c, a_o, p_f, p_o.
    """

    states, weights = 2, 5

    @staticmethod
    def step(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        """x (3, ..., D), w (5, D), s (2, ..., D) -> the next state."""
        c, h = s
        f, g = (w[0] * h + w[3] * c + x[0]).sigmoid(), (w[1] * h + x[1]).tanh()
        c = g + f * (c - g)
        return torch.stack([c, (w[2] * h + w[4] * c + x[2]).sigmoid() * c.tanh()])

    @staticmethod
    def slopes(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next state, its Jacobian (2, 2, ..., D), and its slopes by x (3, 2, ..., D)."""
        c, h = s
        f, g = (w[0] * h + w[3] * c + x[0]).sigmoid(), (w[1] * h + x[1]).tanh()
        by_f, by_g = (c - g) * f * (1 - f), (1 - f) * (1 - g * g)
        c_by_c, c_by_h = f + w[3] * by_f, w[0] * by_f + w[1] * by_g
        c = g + f * (c - g)
        o, tanh = (w[2] * h + w[4] * c + x[2]).sigmoid(), c.tanh()
        by_o = tanh * o * (1 - o)
        h_by_c = o * (1 - tanh * tanh) + w[4] * by_o
        jacobian = torch.stack([c_by_c, c_by_h, h_by_c * c_by_c, h_by_c * c_by_h + w[2] * by_o])
        by_x = torch.stack([by_f, h_by_c * by_f, by_g, h_by_c * by_g, torch.zeros_like(by_o), by_o])
        return torch.stack([c, o * tanh]), jacobian.unflatten(0, (2, 2)), by_x.unflatten(0, (3, 2))

    @staticmethod
    def weight_slopes(x: Tensor, w: Tensor, s: Tensor, by_x: Tensor) -> tuple[Tensor, ...]:
        """What each weight multiplies, through what x it acts: pairs (factor, place in x)."""
        c, h = s
        f, g = (w[0] * h + w[3] * c + x[0]).sigmoid(), (w[1] * h + x[1]).tanh()
        return (h, 0), (h, 1), (h, 2), (c, 0), (g + f * (c - g), 2)


CELLS = {"gru": Gru, "lstm": Lstm}
