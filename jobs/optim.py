"""AdamW and its learning rate: what is decayed, how fast it goes at each step.

The rate of a step is a function of the step alone and is set by the loop before each update, so a resumed run has no
schedule to restore and an engine no scheduler of its own.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names, which are also the checkpoint's


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule.

    lr:       peak learning rate, reached after `warmup` steps.
    schedule: cosine and linear fall to `floor` * lr at the last step; wsd stays at the peak and falls linearly over the
              last `cooldown` share of the run; constant stays.
    decay:    weight decay, of matrices only (no norms, biases, other 1-D parameters).
    clip:     largest global gradient norm; 0 for no clipping.
    """

    lr: float = 1e-3
    warmup: int = 20
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    floor: float = 0.1
    cooldown: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("warmup", "decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be at least 0")
        for name in ("floor", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be in [0, 1]")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update number `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        begin = self.warmup
        if self.schedule == "wsd":
            begin = max(begin, round(steps * (1 - self.cooldown)))
        done = min(max((step - begin) / max(steps - 1 - begin, 1), 0.0), 1.0)
        fall = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.lr * (self.floor + (1 - self.floor) * fall)


def groups(parameters: dict[str, Tensor], decay: float) -> list[dict]:
    """AdamW's parameter groups: matrices with weight decay, the rest without."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    others = [p for p in parameters.values() if p.dim() < 2]
    both = ({"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in both if group["params"]]


def adamw(parameters: dict[str, Tensor], optim: Optim) -> torch.optim.AdamW:
    """The optimizer both engines use. Its rate is 0 until the loop sets it."""
    return torch.optim.AdamW(groups(parameters, optim.decay), lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def empty_moments(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one parameter before its first update, created where there is none.

    AdamW makes it lazily in its first step; restoring a checkpoint needs it before.
    """
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
