"""What one step of each recurrent cell computes, unit by unit: the definition that every form shares but Triton's.

A step takes z, the gates' pre-activations, and the state before, whose first tensor is what the recurrent weights
read; it returns the state after, whose first tensor is the output. Everything is elementwise, so a step's Jacobian is
diagonal over units. z is what the inputs give plus what the hidden units give, but for a GRU's candidate, which needs
the two apart: `merge` makes z of x and r, both (..., G, U), and its first G entries are those through which r enters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _add(x_GU: Tensor, r_GU: Tensor) -> Tensor:
    return x_GU + r_GU


def _add_but_last(x_GU: Tensor, r_GU: Tensor) -> Tensor:
    return torch.cat([x_GU[..., :-1, :] + r_GU[..., :-1, :], r_GU[..., -1:, :], x_GU[..., -1:, :]], -2)


@dataclass(frozen=True)
class Cell:
    """gates: of x. state: fresh value of each state tensor. step: (z, state) -> state. inputs: of z that x enters."""

    gates: int
    state: tuple[float, ...]
    step: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]
    merge: Callable[[Tensor, Tensor], Tensor] = _add

    @property
    def inputs(self) -> list[int]:
        """The entries of z through which each gate of x enters."""
        last = self.gates if self.merge is _add_but_last else self.gates - 1
        return [*range(self.gates - 1), last]


def _tanh(z, state):
    return (z[0].tanh(),)


def _relu(z, state):
    return (z[0].relu(),)


def _gru(z, state):
    new = torch.tanh(z[3] + z[0].sigmoid() * z[2])
    return (new + z[1].sigmoid() * (state[0] - new),)


def _lstm(z, state):
    i, f, g, o = z
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _slstm(z, state):
    i, f, g, o = z
    forget = logsigmoid(f) + state[3]
    most = torch.maximum(forget, i)
    keep, write = (forget - most).exp(), (i - most).exp()
    cell = keep * state[1] + write * g.tanh()
    norm = keep * state[2] + write
    return o.sigmoid() * cell / norm, cell, norm, most


def _positive(x: Tensor) -> Tensor:
    """x + 1/2 above 0, else sigmoid(x): above 0 everywhere, so that its logarithm exists (arXiv 2410.01201)."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def min_gru(z: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What h is multiplied by and what is added to it."""
    update, h = z
    return torch.sigmoid(-update), update.sigmoid() * _positive(h)


def min_lstm(z: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What h is multiplied by and what is added to it: the gates f and i over their sum."""
    f, i, h = z
    difference = logsigmoid(f) - logsigmoid(i)
    return difference.sigmoid(), torch.sigmoid(-difference) * _positive(h)


def _linear(gates: Callable) -> Callable:
    def step(z, state):
        decay, given = gates(z)
        return (decay * state[0] + given,)

    return step


# Cells whose gates do not read the hidden units: linear in their state, so no loop over time is needed.
LINEAR = {"min_gru": min_gru, "min_lstm": min_lstm}
CELLS = {
    "tanh": Cell(1, (0.0,), _tanh),
    "relu": Cell(1, (0.0,), _relu),
    "gru": Cell(3, (0.0,), _gru, _add_but_last),
    "lstm": Cell(4, (0.0, 0.0), _lstm),
    "slstm": Cell(4, (0.0, 0.0, 0.0, -torch.inf), _slstm),
    "min_gru": Cell(2, (0.0,), _linear(min_gru)),
    "min_lstm": Cell(3, (0.0,), _linear(min_lstm)),
}
