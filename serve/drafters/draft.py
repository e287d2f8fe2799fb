"""A small model drafts for a large one with the same vocabulary.

It draws its guesses with the request's own numbers: a number that picks a token from one distribution picks the same
one from a similar distribution, so that guesses hold at temperature too (and are checked exactly, as all are).

Its state follows the tokens that are known. What it computed of its own guesses stays computed as far as they held, so
that it never reads a token twice.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoder import Decoder
from models.state import DRAFT, State
from serve.memory import StateMemory
from serve.sampler import sample
from serve.scheduler import Sequence
from serve.speculative import Draft, Outputs
from serve.step import Part, Step
from serve.width import Chains


@dataclass(frozen=True)
class _Guesses:
    """What was read of each follower: its last known token, then the guesses. moments: the state before, and after each
    step."""

    followers: list[Sequence]
    read: list[list[int]]
    moments: list[State]


class DraftModel(Chains):
    """model: a causal decoder. max_rows, max_len: as of the engine. widest: tokens of a draft. chunk: tokens that are
    caught up with at once; a row that lacks more is not drafted for yet."""

    reads = False

    def __init__(self, model: Decoder, max_rows: int, max_len: int, widest: int = 15, chunk: int = 256) -> None:
        if not 1 <= widest < DRAFT:
            raise ValueError(f"draft model: widest={widest}: must be from 1 to {DRAFT - 1}")
        self.model, self.widest, self.chunk = model.eval(), widest, chunk
        room = max_len + widest  # guesses for a row that is nearly full reach past its end
        self.memory = StateMemory(model.state_spec(room), max_rows, room, device=model.embedding.weight.device)
        self._call = Step(model, self.memory)
        self._followers: dict[int, Sequence] = {}  # by the id of the sequence each follows
        self._last: _Guesses | None = None

    def propose(self, sequences: Items[Sequence], width: int) -> list[Draft | None]:
        drafts: list[Draft | None] = [None] * len(sequences)
        if self._last is not None:
            self._keep(self._last)
        ready = self._catch_up(sequences, width)
        if not ready:
            return drafts
        followers = [follower for _, follower in ready]
        own = [sequences[index] for index, _ in ready]
        samplings = [sequence.sampling for sequence in own]
        rows = tuple(follower.row for follower in followers)
        read, moments = [[follower.tokens[-1]] for follower in followers], [self.memory.take(rows)]
        for step in range(width + 1):  # the last guess is read too: then the next draft begins with one token
            ids_B1 = torch.tensor([tokens[-1:] for tokens in read], device=self.memory.device)
            logits_BC, state = self._call.onward(ids_B1, moments[-1])
            moments.append(state)
            if step < width:
                positions = [sequence.generated + step for sequence in own]
                for tokens, token in zip(read, sample(logits_BC, samplings, positions)):
                    tokens.append(token)
        self._last = _Guesses(followers, read, moments)
        for (index, _), tokens in zip(ready, read):
            drafts[index] = Draft.chain(tokens[1:])
        return drafts

    def ready(self, rows: int) -> bool:
        return self._call.ready(range(min(rows, self.memory.rows)), 1)  # others are not drafted for

    def _keep(self, last: "_Guesses") -> None:
        """What was computed of guesses that turned out right is the state now."""
        self._last = None
        here = [index for index, follower in enumerate(last.followers) if self._followers.get(follower.id) is follower]
        held = []
        for follower, read in ((last.followers[index], last.read[index]) for index in here):
            known = follower.tokens[follower.computed : -1]
            right = (index for index, (ours, theirs) in enumerate(zip(read, known)) if ours != theirs)
            held.append(next(right, min(len(read), len(known))))
            follower.computed += held[-1]
        if not here:
            return
        here_B = torch.tensor(here, device=self.memory.device)
        held_B = torch.tensor(held, device=self.memory.device)
        state = {
            name: torch.stack([moment[name] for moment in last.moments])[held_B, here_B]
            for name, value in last.moments[0].items()
            if isinstance(value, Tensor)  # what grows was written in place: the length says how much of it counts
        }
        self.memory.put(tuple(last.followers[index].row for index in here), state)

    def _catch_up(self, sequences: Items[Sequence], width: int) -> list[tuple[int, Sequence]]:
        """Computes known tokens but the last; of each row that then lacks only that its index and its follower."""
        found = []
        for index, sequence in enumerate(sequences):
            follower = self._follower(sequence)
            if follower is not None:
                follower.tokens = sequence.tokens
                if self.memory.grow(follower.row, len(sequence.tokens) + width):
                    found.append((index, follower))
        parts = [Part(row, min(row.missing - 1, self.chunk)) for _, row in found if row.missing > 1]
        self.usual = not parts
        if parts:
            self._call(parts)
            for part in parts:
                part.sequence.computed += part.tokens
        return [(index, follower) for index, follower in found if follower.missing == 1]

    def _follower(self, sequence: Sequence) -> Sequence | None:
        """What this model has computed of `sequence`; None when there is no memory for it."""
        follower = self._followers.get(sequence.id)
        if follower is None:
            row = self.memory.allocate(1)
            if row is None:
                return None
            follower = Sequence(sequence.id, sequence.tokens, sequence.sampling, sequence.prompt, None, row=row)
            self._followers[sequence.id] = follower
        return follower

    def see(self, sequence: Sequence, outputs: Outputs) -> None:
        """Nothing: `reads` is False."""

    def forget(self, sequence: Sequence) -> None:
        follower = self._followers.pop(sequence.id, None)
        if follower is not None:
            self.memory.free(follower.row)
