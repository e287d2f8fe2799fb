"""Self-speculation: the layers that taught a model to look ahead (`mtp`) draft for it, one small layer for each token.

They read the model's outputs as it computes them and have state of their own, in a memory of its own. What a prefix
cache spares the model they have not read: then their document begins later, and drafts are a little worse.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.decoder import Decoder
from models.heads.mtp import MTP
from serve.memory import StateMemory
from serve.sampler import sample
from serve.scheduler import Sequence
from serve.speculative import Draft, Outputs
from serve.width import Chains

_ALONE = 32  # outputs to read from which on a row is computed by itself: beside others it would mostly be padding


@dataclass(eq=False, slots=True)
class _Row:
    """start: tokens of the sequence before the first output. read: outputs in the state, outputs: the later ones."""

    row: int
    start: int
    read: int = 0
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def new(self) -> int:
        return sum(map(len, self.outputs))


class MTPHeads(Chains):
    """model: a decoder whose head is `mtp`. max_rows, max_len: as of the engine."""

    reads = True

    def __init__(self, model: Decoder, max_rows: int, max_len: int) -> None:
        if not isinstance(model.head, MTP):
            raise ValueError(f"mtp: the model's head is {type(model.head).__name__}; train one with head=mtp")
        self.model, self.head, self.widest = model, model.head, model.head.config.depth
        device = model.embedding.weight.device
        self.memory = StateMemory(self.head.state_spec(max_len), max_rows, max_len, device=device)
        self._rows: dict[int, _Row] = {}

    def propose(self, sequences: Items[Sequence], width: int) -> list[Draft | None]:
        drafts: list[Draft | None] = [None] * len(sequences)
        near, far = [], []
        for index, sequence in enumerate(sequences):
            row = self._rows.get(sequence.id)
            if row is None or row.start + row.read + row.new != sequence.computed or not row.new:
                continue
            if self.memory.grow(row.row, row.read + row.new + self.widest):
                (far if row.new >= _ALONE else near).append(index)
        for group in [near, *([index] for index in far)]:
            if group:
                for index, guess in zip(group, self._draft([sequences[index] for index in group])):
                    drafts[index] = Draft.chain(guess[:width])
        return drafts

    def _draft(self, sequences: list[Sequence]) -> list[list[int]]:
        rows = [self._rows[sequence.id] for sequence in sequences]
        counts = [row.new for row in rows]
        most, device = max(counts), self.memory.device
        x_BTD = torch.zeros(len(rows), most, rows[0].outputs[0].shape[1], dtype=rows[0].outputs[0].dtype, device=device)
        ids = []
        for index, (sequence, row, count) in enumerate(zip(sequences, rows, counts)):
            x_BTD[index, :count] = torch.cat(row.outputs)
            first = row.start + row.read + 1
            ids.append([*sequence.tokens[first : first + count], *[0] * (most - count)])
        segments_BT = None
        if min(counts) < most:
            counts_B1 = torch.tensor(counts, device=device)[:, None]
            segments_BT = -(torch.arange(most, device=device) >= counts_B1).long()

        def choose(logits_BC: Tensor, depth: int) -> Tensor:  # with the request's own numbers, as the model will
            positions = [sequence.generated + depth for sequence in sequences]
            return torch.tensor(sample(logits_BC, [s.sampling for s in sequences], positions), device=device)

        own = tuple(row.row for row in rows)
        ids_BT = torch.tensor(ids, device=device)
        state = self.memory.take(own)
        guesses_BK, state = self.head.draft(x_BTD, ids_BT, self.model.embed, state, segments_BT, choose)
        self.memory.put(own, state)
        for row, count in zip(rows, counts):
            row.read, row.outputs = row.read + count, []
        return guesses_BK.tolist()

    def see(self, sequence: Sequence, outputs: Outputs) -> None:
        row = self._rows.get(sequence.id)
        if row is not None and row.start + row.read + row.new != sequence.computed:  # it begins anew
            self.forget(sequence)
            row = None
        if row is None:
            own = self.memory.allocate(1)
            if own is None:
                return
            row = self._rows[sequence.id] = _Row(own, sequence.computed)
        row.outputs.append(outputs.all())

    def forget(self, sequence: Sequence) -> None:
        row = self._rows.pop(sequence.id, None)
        if row is not None:
            self.memory.free(row.row)
