"""What a training job knows of any architecture: a batch goes in, a scalar loss and metrics come out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.stateful import Stateful

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Input:
    """A tensor that `predict` takes. shape: of a row, None for any length. least, most: of whole numbers, None for any.

    like: the input that has the same shape, if one must. optional: may be missing.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    least: int | None = None
    most: int | None = None
    like: str | None = None
    optional: bool = False


class Model(nn.Module):
    """A trainable architecture. A subclass has a frozen `Config` with a classmethod `tiny()`, built as `Model(config)`.

    family: of the catalogue.
    """

    family = ""

    @dataclass(frozen=True)
    class Config:
        """No options."""

        @classmethod
        def tiny(cls) -> "Model.Config":
            """A config that trains on a CPU in seconds."""
            return cls()

    def forward(self, batch: Batch, phase: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """(total, metrics): this phase's loss to minimise, a mean over `weight(batch)` items, and scalars to log."""
        raise TypeError(f"{type(self).__name__} must define forward(batch, phase)")

    def weight(self, batch: Batch) -> Tensor:
        """How many items `forward`'s mean is over, a scalar; sums over ranks and micro-batches are exact with it."""
        return next(iter(batch.values())).new_tensor(len(next(iter(batch.values()))))

    def phases(self) -> tuple[str, ...]:
        """Phases of a step in order, a name may come twice; each trains the submodule it is named after, with an
        optimizer of its own. A single `main` trains everything."""
        return ("main",)

    def after_step(self) -> None:
        """Called once after each optimizer step, on whole weights: averages, router biases. Here it asks the parts."""
        for part in self.modules():
            if isinstance(part, Stateful):
                part.after_step()

    def predict(self, inputs: Batch) -> Batch:
        """What serving calls with what `takes` names; every output has a row for each row of the inputs."""
        raise TypeError(f"{type(self).__name__} does not predict")

    def takes(self) -> dict[str, Input]:
        """What `predict` reads, by name."""
        raise TypeError(f"{type(self).__name__} does not predict")

    def example(self, n: int, seed: int = 0) -> Any:
        """A learnable batch of `n` items in the shape that `forward` takes."""
        raise TypeError(f"{type(self).__name__} has no example")
