"""The smallest model that keeps the Model contract and has what makes engines differ.

Odd sizes, a tied weight, a frozen parameter, a buffer, and losses that are means over different numbers of items.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.model import Model

ROWS = 8


class Toy(Model):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 13)
        self.up = nn.Linear(13, 31)
        self.norm = nn.LayerNorm(31)
        self.down = nn.Linear(31, 13, bias=False)
        self.head = nn.Linear(13, 17)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 13), requires_grad=False)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, batch, phase="main"):
        x = self.embedding(batch["ids_BT"]) * self.frozen
        logits = self.head(x + self.down(self.norm(self.up(x)).relu()))
        total = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets_BT"].flatten(), reduction="sum")
        loss = total / self.weight(batch).clamp(min=1)
        return loss, {"loss": loss.detach()}

    def weight(self, batch):
        return (batch["targets_BT"] != -100).sum()

    def after_step(self):
        self.steps += 1


def rows(step: int) -> dict[str, torch.Tensor]:
    """The global batch of a step; the later a row, the fewer its targets, so that no two parts weigh the same."""
    generator = torch.Generator().manual_seed(step)
    ids_BT = torch.randint(17, (ROWS, 9), generator=generator)
    targets_BT = (ids_BT * 3 + 1) % 17
    dropped = torch.rand(targets_BT.shape, generator=generator) < torch.arange(ROWS)[:, None] / ROWS
    return {"ids_BT": ids_BT, "targets_BT": targets_BT.masked_fill(dropped, -100)}


def share(batch: dict, rank: int, ranks: int, accumulate: int) -> list[dict]:
    """This rank's micro-batches of a global batch."""
    per = ROWS // ranks // accumulate
    starts = [rank * per * accumulate + i * per for i in range(accumulate)]
    return [{name: value[start : start + per] for name, value in batch.items()} for start in starts]
