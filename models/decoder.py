"""The one decoder: embedding, blocks of any mixers and ffns, a head. Every sequence architecture is a config of it.

It alone knows documents: it turns segment ids and carried lengths into a `Span` once, and prefixes state names with the
layer. `pattern` and `ffn` are tiled over the depth: `pattern="3*gated_deltanet gqa"` with 8 layers is two such groups.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from models.config import parse_part
from models.layers import norm
from models.layers.norm import Norm
from models.model import Batch, Input, Model
from models.span import Span, localize
from models.stack import Stack, draw_linears
from models.state import DRAFT, Kept, Pages, State, TensorSpec
from models.stateful import Place, Stateful
from models.tree import depths


class Decoder(Model):
    """needs_memory: its tokens read an encoder's output, so it answers no prompt by itself."""

    family = "transformer"
    needs_memory = False
    frozen = False

    @dataclass(frozen=True)
    class Config:
        """vocab: token classes. pattern, ffn, block: mixers, ffns and residual schemes, tiled over `layers`.

        norm, eps: of all norms of the stream. scale: of the embedding. embedding_norm: it is normalised before the
        first layer. tied: head = embedding.
        """

        vocab: int = 256
        dim: int = 256
        layers: int = 4
        pattern: str = "gqa"
        ffn: str = "swiglu"
        block: str = "norm_placement"
        head: str = "lm"
        norm: Norm = "rms"
        eps: float = 1e-6
        scale: float = 1.0
        embedding_norm: bool = False
        tied: bool = False

        @classmethod
        def tiny(cls) -> "Decoder.Config":
            return cls(vocab=64, dim=64, layers=2)

    def __init__(self, config: Config) -> None:
        super().__init__()
        for name in ("vocab", "dim", "layers"):
            if getattr(config, name) < 1:
                raise ValueError(f"decoder.{name}={getattr(config, name)}: must be at least 1")
        head, head_config = parse_part(config.head, "head")
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim)
        if config.embedding_norm:
            self.embedding_norm = norm.make(config.norm, config.dim, config.eps)
        self.blocks = self.stack(config)
        self.norm = norm.make(config.norm, config.dim, config.eps)
        self.head = head(
            head_config, Place(config.dim, config.layers, config.layers, config.vocab, config.norm, config.eps)
        )
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        draw_linears(self, config.layers)
        if config.tied:
            self.head.weight = self.embedding.weight

    @classmethod
    def stack(cls, config: Config, **options: Any) -> Stack:
        """The layers, which policies use too; patterns with other layers replace it. options: of `Stack`."""
        c = config
        return Stack(c.pattern, c.ffn, c.block, c.dim, c.layers, c.vocab, norm=c.norm, eps=c.eps, **options)

    def freeze(self) -> None:
        """Only what the head has beyond the next token learns from now on.

        All else stays as it is, bit for bit: weights, router biases, averages; and it computes what it does in eval.
        """
        self.frozen = True
        names = tuple(f"head.{name}" for name in self.head.added)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(names))
        self.train(self.training)

    def train(self, mode: bool = True) -> "Decoder":
        super().train(mode)
        if self.frozen:
            for name, part in self.named_children():
                part.train(mode and name == "head")
        return self

    def after_step(self) -> None:
        for part in (self.head if self.frozen else self).modules():
            if isinstance(part, Stateful):
                part.after_step()

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def causal(self) -> bool:
        """Whether every layer is; only then is this a language model."""
        return self.blocks.causal

    def state_spec(self, max_len: int) -> dict[str, TensorSpec]:
        """Every state tensor of a row: the document's `length` and id `segment`, then the layers', prefixed."""
        document = {"length": TensorSpec((), torch.int64), "segment": TensorSpec((), torch.int64)}
        return document | self.blocks.state_spec(max_len)

    def init_state(self, rows: int, max_len: int, device: torch.device | None = None) -> State:
        """Fresh state of `rows` rows with room for documents of `max_len` tokens."""
        if rows < 1 or max_len < 1:
            raise ValueError(f"init_state(rows={rows}, max_len={max_len}): both must be at least 1")
        device = device or self.embedding.weight.device
        return {name: spec.empty(rows, max_len, device) for name, spec in self.state_spec(max_len).items()}

    # -- forward -------------------------------------------------------------------------------------------------

    def hidden(
        self,
        ids_BT: Tensor,
        state: State | None = None,
        segments_BT: Tensor | None = None,
        keep: int = 0,
        shared: dict[str, Tensor] | None = None,
        places_BTA: Tensor | None = None,
        parents_BT: Tensor | None = None,
    ) -> tuple[Tensor, Span, State | None]:
        """Normed outputs of the last layer (B, T, D), the span they stand at, and the state after."""
        at = self._span(ids_BT, state, segments_BT, keep, parents_BT)
        at = replace(at, shared=shared or {}, places_BTA=places_BTA)
        x_BTD = self.embed(ids_BT)
        at.shared["embedding"] = x_BTD
        x_BTD, after = self.blocks(x_BTD, at, state)
        return self.norm(x_BTD), at, None if state is None else self._count(at, state, segments_BT) | after

    def embed(self, ids_BT: Tensor) -> Tensor:
        """What enters the first layer, (B, T, D)."""
        x_BTD = self.embedding(ids_BT)
        if self.config.scale != 1:  # a number of the weights' dtype, as the checkpoints that have one were trained
            x_BTD = x_BTD * torch.tensor(self.config.scale, dtype=x_BTD.dtype, device=x_BTD.device)
        return self.embedding_norm(x_BTD) if self.config.embedding_norm else x_BTD

    def logits(
        self,
        ids_BT: Tensor,
        state: State | None = None,
        segments_BT: Tensor | None = None,
        keep: int = 0,
        places_BTA: Tensor | None = None,
        parents_BT: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Next-token logits (B, T, C) and the state after the call (None when none was given).

        ids_BT: int64 token ids. segments_BT: document ids >= 0, -1 for padding anywhere in a row; a change begins a
        new document. keep=k: the state can be committed by `models.state.select` after any of the last k tokens.
        places_BTA: where position schemes take the tokens to stand, (B, T) or (B, T, axes); None: their positions.
        parents_BT: the tokens are a draft tree that continues each row's document: the column of each one's parent,
        before it, int64, -1 where it follows the document itself. Segments are then 0, or -1 for padding, and
        `select` commits a path from a root on; nothing else may be done with the state.
        """
        x_BTD, at, state = self.hidden(ids_BT, state, segments_BT, keep, None, places_BTA, parents_BT)
        return self.head(x_BTD, at)[0], state

    def forward(self, batch: Batch, phase: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Mean next-token loss in nats over the targets (-100: none); `segments_BT` may be missing from the batch."""
        x_BTD, at, _ = self.hidden(batch["ids_BT"], None, batch.get("segments_BT"))
        return self.mean_loss(x_BTD, at, batch)

    def mean_loss(self, x_BTD: Tensor, at: Span, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of outputs `x_BTD` against the batch's targets, and what to log of it.

        In training the losses that parts add (balance of a router, further heads) come on top of `loss`.
        """
        losses_BT, _ = self.head(x_BTD, at, targets_BT=batch["targets_BT"])
        loss = losses_BT.sum() / self.weight(batch).clamp(min=1)
        metrics = {name: torch.stack(values).mean() for name, values in at.metrics.items()}
        total = loss + torch.stack(at.losses).sum() if self.training and at.losses else loss
        return total, {"loss": loss.detach()} | metrics

    def weight(self, batch: Batch) -> Tensor:
        return (batch["targets_BT"] != -100).sum()

    def predict(self, inputs: Batch) -> Batch:
        return {"logits_BTC": self.logits(inputs["ids_BT"], None, inputs.get("segments_BT"))[0]}

    def takes(self) -> dict[str, Input]:
        return {
            "ids_BT": Input(torch.int64, (None,), 0, self.config.vocab - 1),
            "segments_BT": Input(torch.int64, (None,), -1, like="ids_BT", optional=True),
        }

    def example(self, n: int, seed: int = 0) -> Batch:
        """Rows of 32 tokens, each the first half twice: bigrams are learnt at once, the copy with memory."""
        generator = torch.Generator().manual_seed(seed)
        half_B16 = torch.randint(self.config.vocab, (n, 1), generator=generator).repeat(1, 16)
        for t in range(1, 16):
            half_B16[:, t] = (half_B16[:, t - 1] * 5 + torch.randint(2, (n,), generator=generator)) % self.config.vocab
        row_BT = torch.cat([half_B16, half_B16, half_B16[:, :1]], 1)
        return {"ids_BT": row_BT[:, :-1].contiguous(), "targets_BT": row_BT[:, 1:].contiguous()}

    # -- documents -----------------------------------------------------------------------------------------------

    def _span(
        self,
        ids_BT: Tensor,
        state: State | None,
        segments_BT: Tensor | None,
        keep: int,
        parents_BT: Tensor | None = None,
    ) -> Span:
        if ids_BT.dim() != 2 or ids_BT.dtype != torch.int64 or not ids_BT.numel():
            got = f"{ids_BT.dtype} {tuple(ids_BT.shape)}"
            raise ValueError(f"ids_BT: expected int64 of at least one row and one token, (rows, tokens), got {got}")
        if segments_BT is not None and segments_BT.shape != ids_BT.shape:
            raise ValueError(f"segments_BT: shape {tuple(segments_BT.shape)} differs from ids_BT {tuple(ids_BT.shape)}")
        if keep and state is None:
            raise ValueError("keep: there is nothing to roll back without a state")
        if parents_BT is not None:
            if parents_BT.shape != ids_BT.shape or parents_BT.dtype != torch.int64:
                raise ValueError(f"parents_BT: expected int64 of the shape of ids_BT, {tuple(ids_BT.shape)}")
            if state is None or keep:
                raise ValueError("parents_BT: a draft tree continues the document of a state, and is kept whole")
        if state is not None and not torch.compiler.is_compiling():
            self._check_state(state, keep)
        length_B = None if state is None else state["length"]
        if length_B is not None and len(length_B) != len(ids_BT):
            raise ValueError(f"state has {len(length_B)} rows, ids_BT has {len(ids_BT)}")
        if parents_BT is not None:
            local_BT = None if segments_BT is None else segments_BT.clamp(max=0)
            depth_BT = depths(parents_BT)
            depth_BT = depth_BT if local_BT is None else torch.where(local_BT < 0, 0, depth_BT)
            positions_BT = length_B[:, None] + depth_BT
        elif segments_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
            positions_BT = positions_BT if length_B is None else positions_BT + length_B[:, None]
            local_BT = None
        else:
            local_BT, positions_BT = localize(segments_BT, length_B, None if state is None else state["segment"])
        if not torch.compiler.is_compiling() and type(ids_BT) is Tensor and ids_BT.is_cpu:
            self._check_values(ids_BT, state, local_BT, positions_BT, keep)
            if parents_BT is not None:
                self._check_tree(parents_BT, local_BT, positions_BT - length_B[:, None])
        if parents_BT is None:
            return Span(positions_BT, ids_BT, local_BT, length_B, keep)
        tree = {"parents_BT": parents_BT, "drafts": True}
        return Span(positions_BT, ids_BT, local_BT, length_B, ids_BT.shape[1], **tree)

    @cached_property
    def _names(self) -> set[str]:
        return set(self.state_spec(1))

    @cached_property
    def _growing(self) -> list[tuple[str, TensorSpec]]:
        return [(name, spec) for name, spec in self.state_spec(1).items() if spec.every]

    @cached_property
    def _windowed(self) -> bool:
        return any(spec.window for _, spec in self._growing)

    def _check_state(self, state: State, keep: int) -> None:
        if state.keys() != self._names:
            raise ValueError("state: it is not of this model; begin with init_state")
        if isinstance(state["length"], Kept):
            raise ValueError("state: kept at several moments; models.state.select first commits one for each row")
        if keep > DRAFT and self._windowed:
            raise ValueError(f"keep={keep}: windows are kept long enough to roll back {DRAFT} tokens, no more")

    def _check_values(
        self, ids_BT: Tensor, state: State | None, local_BT: Tensor | None, positions_BT: Tensor, keep: int
    ) -> None:
        """What only the values tell. A GPU would have to be waited for; there the caller, an engine, knows its rows."""
        if not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < self.config.vocab:
            raise ValueError(f"ids_BT: from {int(ids_BT.min())} to {int(ids_BT.max())}, vocab={self.config.vocab}")
        if state is None:
            return
        tokens = int(positions_BT.max()) + 1
        for name, spec in self._growing:
            value = state[name]
            room = value.capacity if isinstance(value, Pages) else value.shape[1]
            if tokens > room * spec.every and not (spec.window and room >= spec.window + DRAFT):
                raise ValueError(f"a document reaches {tokens} tokens, its state has room for {room}: raise max_len")
        if keep and local_BT is not None:
            starts_BT = (local_BT > 0) & (positions_BT == 0) & ((local_BT > 1) | (state["length"] > 0)[:, None])
            if starts_BT[:, -keep:].any():
                raise ValueError("keep: a document begins in the kept columns, over the one before; split the call")

    def _check_tree(self, parents_BT: Tensor, local_BT: Tensor | None, depth_BT: Tensor) -> None:
        real_BT = torch.ones_like(parents_BT, dtype=torch.bool) if local_BT is None else local_BT >= 0
        parents_BT = torch.where(real_BT, parents_BT, -1)
        if ((parents_BT < -1) | (parents_BT >= torch.arange(parents_BT.shape[1]))).any():
            raise ValueError("parents_BT: of each token the column of its parent, before its own; -1 for none")
        if ((parents_BT >= 0) & ~real_BT.gather(1, parents_BT.clamp(min=0))).any():
            raise ValueError("parents_BT: a parent is padding")
        if int(depth_BT.max()) >= DRAFT and self._windowed:
            raise ValueError(f"parents_BT: windows are kept long enough to roll back {DRAFT} tokens, no more")

    def _count(self, at: Span, state: State, segments_BT: Tensor | None) -> State:
        """`length` and `segment` after the call, or before and after each of the last `keep` columns."""
        columns, keep = at.positions_BT.shape[1], at.keep
        if segments_BT is None or at.parents_BT is not None:
            steps_K = torch.arange(columns - keep, columns + 1, device=at.positions_BT.device)
            moments = {
                "length": state["length"][:, None] + steps_K,
                "segment": state["segment"][:, None].expand(-1, keep + 1),
            }
        else:
            valid_BT, columns_T = segments_BT >= 0, torch.arange(columns, device=segments_BT.device)
            real_BT = torch.where(valid_BT, columns_T, -1).cummax(1).values  # the last real column up to here
            real_BK = torch.cat([torch.full_like(real_BT[:, :1], -1), real_BT], 1)[:, columns - keep :]
            moments = {}
            for name, value_BT in (("length", at.positions_BT + 1), ("segment", segments_BT)):
                latest_BK = value_BT.gather(1, real_BK.clamp(min=0))
                moments[name] = torch.where(real_BK >= 0, latest_BK, state[name][:, None])
        return {name: Kept(value_BK) if keep else value_BK[:, 0] for name, value_BK in moments.items()}
