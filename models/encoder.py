"""The frame of text encoders: tokens that see both ways learn by telling those that were hidden from them.

    h = blocks(norm(E[hide(ids)] + P[position]));   logits = E norm(act(W h)) + b
    loss = mean of -log softmax(logits)[ids] over the hidden tokens

arXiv 1810.04805 (BERT): of each row a share of the tokens is drawn anew in each call; of those 80% become the mask
token, 10% some token and 10% stay. Differs from the paper: no token types, no second sentence, no dropout; a row gives
a fixed number of hidden tokens, so that the loss is a mean over a number known before the draw.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import at_least, parse_part
from models.layers import norm
from models.layers.activation import activate
from models.layers.mlp import MLP, Activation
from models.model import Batch, Input, Model
from models.span import Span, localize
from models.stack import Layers, draw_linears
from models.stateful import Place, Stateful


class Encoder(Model):
    """A subclass says what its `mixer` is. Ids go from 0 to vocab: the last one, vocab itself, is the mask token.

    packs: its mixer keeps the documents of a row apart; for others each document becomes a row of its own.
    inputs: what its mixers read of a batch besides ids, (B, T) each, as `at.shared`.
    """

    family = "attention"
    packs = False
    inputs: tuple[str, ...] = ()

    @dataclass(frozen=True)
    class Config:
        """vocab: token classes. hidden: units of the MLPs, 0 means 4 dim. length: of the longest document.

        masked: share of the tokens that are hidden and told.
        """

        vocab: int = 256
        dim: int = 256
        layers: int = 4
        hidden: int = 0
        length: int = 512
        activation: Activation = "gelu"
        eps: float = 1e-6
        masked: float = 0.15

        @classmethod
        def tiny(cls) -> "Encoder.Config":
            return cls(vocab=64, dim=64, layers=2)

    def __init__(self, config: Config) -> None:
        super().__init__()
        at_least(config, vocab=1, dim=1, layers=1, length=1)
        if not 0 < config.masked <= 1:
            raise ValueError(f"masked={config.masked}: is a share of the tokens, above 0 and at most 1")
        self.config = config
        self.embedding = nn.Embedding(config.vocab + 1, config.dim)
        self.positions = nn.Embedding(config.length, config.dim)
        self.bias = nn.Parameter(torch.zeros(config.vocab))
        self.build()
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        nn.init.normal_(self.positions.weight, std=config.dim**-0.5)
        draw_linears(self, config.layers)

    def build(self) -> None:
        """Makes everything between the embedding and the logits."""
        c = self.config
        scheme, scheme_config = parse_part("norm_placement(placement=post)", "block")
        self.embedding_norm = norm.make("layer_bias", c.dim, c.eps)
        self.blocks = Layers()
        for layer in range(c.layers):
            place = Place(c.dim, layer, c.layers, c.vocab, "layer_bias", c.eps)
            parts = {"mixer": self.mixer(place), "ffn": MLP(MLP.Config(c.hidden, c.activation), place)}
            self.blocks.append(scheme(scheme_config, parts, place))
        self.transform = nn.Linear(c.dim, c.dim)
        self.head_norm = norm.make("layer_bias", c.dim, c.eps)

    def mixer(self, place: Place) -> Stateful:
        """The mixer of a layer, which sees both ways. Padding, where `at.segments_BT` is -1, is at the end of a row."""
        raise TypeError(f"{type(self).__name__} must define mixer(place)")

    def embed(self, ids_BT: Tensor, at: Span) -> Tensor:
        """What enters the first block, (B, T, D)."""
        return self.embedding_norm(self.embedding(ids_BT) + self.positions(at.positions_BT))

    def encode(self, ids_BT: Tensor, at: Span) -> Tensor:
        """Outputs of the last block, (B, T, D)."""
        return self.blocks(self.embed(ids_BT, at), at)[0]

    def tell(self, x_BTD: Tensor) -> Tensor:
        """Logits (B, T, C) of the tokens that stand at `x_BTD`."""
        x_BTD = self.head_norm(activate(self.transform(x_BTD), self.config.activation))
        return F.linear(x_BTD, self.embedding.weight[:-1], self.bias)

    # -- documents -----------------------------------------------------------------------------------------------

    def hidden(
        self, ids_BT: Tensor, segments_BT: Tensor | None = None, shared: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Outputs of the last block (B, T, D), of each document as if it were alone; finite at padding.

        ids_BT: int64, vocab is the mask token. segments_BT: document ids >= 0, -1 for padding anywhere in a row.
        """
        self._check(ids_BT, segments_BT)
        if segments_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
            return self.encode(ids_BT, self._span(positions_BT, None, shared))
        local_BT, positions_BT = localize(segments_BT)
        if not self.packs:
            return self._apart(ids_BT, local_BT, positions_BT)
        # Padding goes to the end, so that neighbours in a document are neighbours.
        order_BT = torch.sort((local_BT < 0).long(), dim=1, stable=True).indices
        ids_BT, local_BT, positions_BT = (x.gather(1, order_BT) for x in (ids_BT, local_BT, positions_BT))
        shared = {name: value.gather(1, order_BT) for name, value in (shared or {}).items()}
        x_BTD = self.encode(ids_BT, self._span(positions_BT, local_BT, shared))
        return x_BTD.gather(1, order_BT.argsort(1)[..., None].expand_as(x_BTD))

    def _apart(self, ids_BT: Tensor, local_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Each document in a row of its own, padded at its end; then back to where it stood."""
        real_BT = local_BT >= 0
        starts_BT = real_BT & (positions_BT == 0)
        documents, longest = max(int(starts_BT.sum()), 1), int(positions_BT.max()) + 1
        document_BT = (starts_BT.flatten().cumsum(0) - 1).view_as(ids_BT).clamp(min=0)
        place_BT = document_BT * longest + positions_BT
        ids_NL = ids_BT.new_zeros(documents * longest).scatter(0, place_BT[real_BT], ids_BT[real_BT])
        count_N = torch.bincount(document_BT[real_BT], minlength=documents).clamp(min=1)
        columns_L = torch.arange(longest, device=ids_BT.device)
        padding_NL = columns_L >= count_N[:, None]
        segments_NL = -padding_NL.long() if bool(padding_NL.any()) else None  # none: the mixers' fast path
        at = self._span(columns_L.expand(documents, -1), segments_NL, None)
        x_ND = self.encode(ids_NL.view(documents, longest), at).flatten(0, 1)
        return x_ND[torch.where(real_BT, place_BT, 0)] * real_BT[..., None]

    def _span(self, positions_BT: Tensor, segments_BT: Tensor | None, shared: dict[str, Tensor] | None) -> Span:
        longest = positions_BT.shape[1]
        if segments_BT is not None and not torch.compiler.is_compiling() and positions_BT.device.type == "cpu":
            longest = int(positions_BT.max()) + 1
        elif segments_BT is not None:
            longest = 0  # only the values tell
        if longest > self.config.length:
            raise ValueError(f"a document has {longest} tokens, length={self.config.length}: raise length")
        return Span(positions_BT, segments_BT=segments_BT, shared=dict(shared or {}))

    def _check(self, ids_BT: Tensor, segments_BT: Tensor | None) -> None:
        if ids_BT.dim() != 2 or ids_BT.dtype != torch.int64 or not ids_BT.numel():
            got = f"{ids_BT.dtype} {tuple(ids_BT.shape)}"
            raise ValueError(f"ids_BT: expected int64 of at least one row and one token, (rows, tokens), got {got}")
        if segments_BT is not None and segments_BT.shape != ids_BT.shape:
            raise ValueError(f"segments_BT: shape {tuple(segments_BT.shape)} differs from ids_BT {tuple(ids_BT.shape)}")
        if not torch.compiler.is_compiling() and ids_BT.device.type == "cpu":
            low, high = int(ids_BT.min()), int(ids_BT.max())
            if low < 0 or high > self.config.vocab:
                raise ValueError(f"ids_BT: from {low} to {high}, vocab={self.config.vocab} (which is the mask token)")

    # -- masked tokens -------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, phase: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss in nats of the hidden tokens, and the share of them told right; batch: ids_BT, segments_BT may be
        missing, and what `inputs` names; targets are the ids themselves."""
        ids_BT, segments_BT = batch["ids_BT"], batch.get("segments_BT")
        index_BK, real_BK = self._draw(ids_BT, segments_BT)
        told_BK = ids_BT.gather(1, index_BK)
        shown_BT = ids_BT.scatter(1, index_BK, torch.where(real_BK, self._hide(told_BK), told_BK))
        masked_BT = torch.zeros_like(ids_BT, dtype=torch.bool).scatter(1, index_BK, real_BK)
        x_BTD = self.hidden(shown_BT, segments_BT, self.shared(batch, masked_BT))
        x_BKD = x_BTD.gather(1, index_BK[..., None].expand(-1, -1, x_BTD.shape[2]))
        logits_BKC = self.tell(x_BKD)
        logits_BKC = logits_BKC.to(torch.promote_types(logits_BKC.dtype, torch.float32))
        losses_BK = F.cross_entropy(logits_BKC.transpose(1, 2), told_BK, reduction="none")
        weight = self.weight(batch).clamp(min=1)
        loss = (losses_BK * real_BK).sum() / weight
        right = ((logits_BKC.argmax(-1) == told_BK) & real_BK).sum() / weight
        return loss, {"loss": loss.detach(), "masked_accuracy": right}

    def shared(self, batch: Batch, masked_BT: Tensor | None = None) -> dict[str, Tensor]:
        """What mixers read of a batch; masked_BT: the tokens that are hidden in this call, None in `predict`."""
        return {name: batch[name] for name in self.inputs if name in batch}

    def weight(self, batch: Batch) -> Tensor:
        """How many tokens a call hides."""
        return self._quota(batch["ids_BT"], batch.get("segments_BT")).sum()

    def _quota(self, ids_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        """Tokens to hide of each row: the share of its real ones, rounded up."""
        real_BT = torch.ones_like(ids_BT) if segments_BT is None else (segments_BT >= 0).long()
        return (real_BT.sum(1).double() * self.config.masked).ceil().long()

    def _draw(self, ids_BT: Tensor, segments_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Columns (B, K) of hidden tokens, and which of them count where a row has padding."""
        score_BT = torch.rand(ids_BT.shape, device=ids_BT.device)
        if segments_BT is not None:
            score_BT = torch.where(segments_BT >= 0, score_BT, -1.0)
        index_BK = score_BT.topk(math.ceil(ids_BT.shape[1] * self.config.masked)).indices
        columns_K = torch.arange(index_BK.shape[1], device=ids_BT.device)
        return index_BK, columns_K < self._quota(ids_BT, segments_BT)[:, None]

    def _hide(self, ids_BK: Tensor) -> Tensor:
        """What is shown in the place of hidden tokens."""
        draw_BK = torch.rand(ids_BK.shape, device=ids_BK.device)
        other_BK = torch.randint(self.config.vocab, ids_BK.shape, device=ids_BK.device)
        return torch.where(draw_BK < 0.8, self.config.vocab, torch.where(draw_BK < 0.9, other_BK, ids_BK))

    def predict(self, inputs: Batch) -> Batch:
        """hidden_BTD, and logits_BTC of what stands in each place; inputs: as `forward`'s, masked where one likes."""
        hidden_BTD = self.hidden(inputs["ids_BT"], inputs.get("segments_BT"), self.shared(inputs))
        return {"hidden_BTD": hidden_BTD, "logits_BTC": self.tell(hidden_BTD)}

    def takes(self) -> dict[str, Input]:
        return {
            "ids_BT": Input(torch.int64, (None,), 0, self.config.vocab),
            "segments_BT": Input(torch.int64, (None,), -1, like="ids_BT", optional=True),
            **{name: Input(torch.int64, (None,), 0, 1, "ids_BT", True) for name in self.inputs},
        }

    def example(self, n: int, seed: int = 0) -> Batch:
        """Rows of 32 tokens, two of them in turn: a hidden one is told by any other two places away."""
        generator = torch.Generator().manual_seed(seed)
        return {"ids_BT": torch.randint(self.config.vocab, (n, 2), generator=generator).repeat(1, 16)}
