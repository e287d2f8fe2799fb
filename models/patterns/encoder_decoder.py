"""Encoder-decoder: one stack reads the source both ways, another writes the target and attends to what was read.

    m = encoder(source);  x = x + mixer(norm(x));  x = x + cross(norm(x), m);  x = x + ffn(norm(x))

arXiv 1706.03762. The encoder's output is projected once per layer into state of fixed size (`remember`), so decoding
needs the source no more. Differs from the paper: norms before the branches, one embedding for both sides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.block import Block, draw_linears, tile
from models.decoder import Decoder
from models.layers.cross_attention import CrossAttention
from models.layers.norm import RMSNorm
from models.model import Batch
from models.span import Span
from models.state import State, prefixed
from models.stateful import Place, Stateful


class CrossBlock(Block):
    """A block with a third branch, between the mixer and the ffn, that reads the encoder's output."""

    branches = ("mixer", "cross", "ffn")

    def __init__(self, mixer: Stateful, cross: CrossAttention, ffn: Stateful, dim: int, eps: float) -> None:
        super().__init__(mixer, ffn, dim, eps)
        self.cross_norm, self.cross = RMSNorm(dim, eps), cross


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
        layers = tile(config.encoder, config.ffn, config.dim, config.encoder_layers, config.vocab)
        self.encoder = nn.ModuleList(Block(mixer, ffn, config.dim, config.eps) for mixer, ffn, _ in layers)
        self.encoder_norm = RMSNorm(config.dim, config.eps)
        draw_linears(self.encoder, config.encoder_layers)

    def block(self, mixer: Stateful, ffn: Stateful, place: Place) -> Block:
        c = self.config
        cross = CrossAttention(CrossAttention.Config(c.heads, c.heads, c.memory), place)
        return CrossBlock(mixer, cross, ffn, c.dim, c.eps)

    def encode(self, source_BS: Tensor, count_B: Tensor) -> Tensor:
        """What the encoder makes of `source_BS` (int64 ids, the first `count_B` of each row real): (B, S, D)."""
        positions_BS = torch.arange(source_BS.shape[1], device=source_BS.device).expand_as(source_BS)
        at = Span(positions_BS, source_BS, -(positions_BS >= count_B[:, None]).long())
        x_BSD = self.embedding(source_BS)
        for block in self.encoder:
            x_BSD, _ = block(x_BSD, at)
        return self.encoder_norm(x_BSD)

    def remember(self, state: State, source_BS: Tensor, count_B: Tensor) -> State:
        """`state` with every layer's cross attention filled from the source; then `logits` goes on from it."""
        memory_BSD, state = self.encode(source_BS, count_B), dict(state)
        for layer, block in enumerate(self.blocks):
            state |= prefixed(f"{layer}.cross", block.cross.remember(memory_BSD, count_B))
        return state

    def forward(self, batch: Batch, phase: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Mean next-token loss of the target; batch: as the decoder's, and source_BS, source_count_B."""
        shared = {
            "memory": self.encode(batch["source_BS"], batch["source_count_B"]),
            "memory_count": batch["source_count_B"],
        }
        x_BTD, at, _ = self.hidden(batch["ids_BT"], None, batch.get("segments_BT"), shared=shared)
        return self.mean_loss(x_BTD, at, batch)

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
