"""Encoder-decoder: one stack reads the source both ways, another writes the target and attends to what was read.

    m = encoder(source);  x = x + mixer(norm(x));  x = x + cross(norm(x), m);  x = x + ffn(norm(x))

arXiv 1706.03762. The encoder's output is projected once per layer into state of fixed size (`remember`), so decoding
needs the source no more. Differs from the paper: norms before the branches, one embedding for both sides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.decoder import Decoder
from models.layers import norm
from models.layers.cross_attention import CrossAttention
from models.model import Batch, Input
from models.span import Span
from models.stack import Stack, draw_linears
from models.state import State, prefixed


class EncoderDecoder(Decoder):
    needs_memory = True

    @dataclass(frozen=True)
    class Config(Decoder.Config):
        """encoder: pattern over encoder_layers, to see both ways. memory: longest source. heads: of the cross."""

        encoder: str = "gqa(mask=full)"
        encoder_layers: int = 2
        memory: int = 64
        heads: int = 4

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.encoder = Stack(c.encoder, c.ffn, c.block, c.dim, c.encoder_layers, c.vocab, norm=c.norm, eps=c.eps)
        self.encoder_norm = norm.make(c.norm, c.dim, c.eps)
        draw_linears(self.encoder, c.encoder_layers)

    @classmethod
    def stack(cls, config: Config, **options: Any) -> Stack:
        cross = CrossAttention.Config(config.heads, config.heads, config.memory)
        return super().stack(config, extra=lambda place: {"cross": CrossAttention(cross, place)}, **options)

    def encode(self, source_BS: Tensor, count_B: Tensor) -> Tensor:
        """What the encoder makes of `source_BS` (int64 ids, the first `count_B` of each row real): (B, S, D)."""
        positions_BS = torch.arange(source_BS.shape[1], device=source_BS.device).expand_as(source_BS)
        at = Span(positions_BS, source_BS, -(positions_BS >= count_B[:, None]).long())
        x_BSD, _ = self.encoder(self.embed(source_BS), at)
        return self.encoder_norm(x_BSD)

    def remember(self, state: State, source_BS: Tensor, count_B: Tensor) -> State:
        """`state` with every layer's cross attention filled from the source; then `logits` goes on from it."""
        memory_BSD, state = self.encode(source_BS, count_B), dict(state)
        for layer, block in enumerate(self.blocks):
            state |= prefixed(f"{layer}.cross", block.cross.remember(memory_BSD, count_B))
        return state

    def forward(self, batch: Batch, phase: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Mean next-token loss of the target; batch: as the decoder's, and source_BS, source_count_B."""
        return self.mean_loss(*self._read(batch), batch)

    def predict(self, inputs: Batch) -> Batch:
        """logits_BTC after each of `ids_BT`, given `source_BS`, of which the first source_count_B tokens are real."""
        counts_B, length = inputs["source_count_B"], inputs["source_BS"].shape[1]
        if int(counts_B.max()) > length:
            raise ValueError(f"source_count_B: {int(counts_B.max())}, but source_BS has {length} tokens")
        return {"logits_BTC": self.head(*self._read(inputs))[0]}

    def takes(self) -> dict[str, Input]:
        last = self.config.vocab - 1
        return {
            "ids_BT": Input(torch.int64, (None,), 0, last),
            "source_BS": Input(torch.int64, (None,), 0, last),
            "source_count_B": Input(torch.int64, (), 0, self.config.memory),
        }

    def _read(self, batch: Batch) -> tuple[Tensor, Span]:
        """What the last block makes of the target after it has seen the source."""
        shared = {
            "memory": self.encode(batch["source_BS"], batch["source_count_B"]),
            "memory_count": batch["source_count_B"],
        }
        x_BTD, at, _ = self.hidden(batch["ids_BT"], None, batch.get("segments_BT"), shared=shared)
        return x_BTD, at

    def example(self, n: int, seed: int = 0) -> Batch:
        """The target is the source backwards, eight kinds of token that only reading the source can tell apart."""
        generator = torch.Generator().manual_seed(seed)
        source_BS = torch.randint(1, min(9, self.config.vocab), (n, 12), generator=generator)
        count_B = torch.randint(4, 13, (n,), generator=generator)
        columns_S = torch.arange(12)
        backwards_BS = source_BS.gather(1, (count_B[:, None] - 1 - columns_S).clamp(min=0))
        targets_BT = torch.where(columns_S < count_B[:, None], backwards_BS, -100)
        ids_BT = torch.cat([torch.zeros(n, 1, dtype=torch.int64), targets_BT[:, :-1].clamp(min=0)], 1)
        return {"ids_BT": ids_BT, "targets_BT": targets_BT, "source_BS": source_BS, "source_count_B": count_B}
