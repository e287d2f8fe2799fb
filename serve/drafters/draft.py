"""A small model drafts for a large one with the same vocabulary.

It draws its guesses with the request's own numbers: a number that picks a token from one distribution picks the same
one from a similar distribution, so that guesses hold at temperature too (and are checked exactly, as all are).

Its state follows the tokens that are known. Guesses are computed on a state that is thrown away: what they write lies
past the row's length and is overwritten.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from models.decoder import Decoder
from models.state import DRAFT
from serve.memory import StateMemory
from serve.sampler import sample
from serve.scheduler import Sequence
from serve.speculative import Draft
from serve.step import Part, Step
from serve.width import Chains


class DraftModel(Chains):
    """model: a causal decoder. max_rows, max_len: as of the engine. widest: tokens of a draft. chunk: tokens that are
    caught up with at once; a row that lacks more is not drafted for yet."""

    reads = False

    def __init__(self, model: Decoder, max_rows: int, max_len: int, widest: int = 7, chunk: int = 256) -> None:
        if not 1 <= widest <= DRAFT:
            raise ValueError(f"draft model: widest={widest}: must be from 1 to {DRAFT}")
        self.model, self.widest, self.chunk = model.eval(), widest, chunk
        room = max_len + widest  # guesses for a row that is nearly full reach past its end
        self.memory = StateMemory(model.state_spec(room), max_rows, room, device=model.embedding.weight.device)
        self._call = Step(model, self.memory)
        self._followers: dict[int, Sequence] = {}  # by the id of the sequence each follows

    def propose(self, sequences: Items[Sequence], width: int) -> list[Draft | None]:
        drafts: list[Draft | None] = [None] * len(sequences)
        ready = self._catch_up(sequences, width)
        if not ready:
            return drafts
        guesses, state, memory = [[token] for _, _, token in ready], None, self.memory
        samplings = [sequences[index].sampling for index, _, _ in ready]
        rows = tuple(follower.row for _, follower, _ in ready)
        for step in range(1, width):
            ids_B1 = torch.tensor([[guess[-1]] for guess in guesses], device=memory.device)
            state = memory.take(rows) if state is None else state
            logits_BC, state = self._call.onward(ids_B1, state)
            positions = [sequences[index].generated + step for index, _, _ in ready]
            for guess, token in zip(guesses, sample(logits_BC, samplings, positions)):
                guess.append(token)
        for (index, _, _), guess in zip(ready, guesses):
            drafts[index] = Draft.chain(guess)
        return drafts

    def _catch_up(self, sequences: Items[Sequence], width: int) -> list[tuple[int, Sequence, int]]:
        """Computes known tokens; of each row that then lacks none its index, its follower and its first guess."""
        parts, owners = [], []
        for index, sequence in enumerate(sequences):
            follower = self._follower(sequence)
            if follower is None:
                continue
            follower.tokens = sequence.tokens
            if self.memory.grow(follower.row, len(sequence.tokens) + width):
                parts.append(Part(follower, min(follower.missing, self.chunk)))
                owners.append(index)
        if not parts:
            return []
        call = self._call(parts)
        ready = [(index, part.sequence) for index, part in zip(owners, parts) if part.complete]
        for part in parts:
            part.sequence.computed += part.tokens
        if not ready:
            return []
        own = [sequences[index] for index, _ in ready]
        tokens = sample(call.logits_NC, [s.sampling for s in own], [s.generated for s in own])
        return [(index, follower, token) for (index, follower), token in zip(ready, tokens)]

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

    def see(self, sequence: Sequence, x_ND: Tensor) -> None:
        """Nothing: `reads` is False."""

    def forget(self, sequence: Sequence) -> None:
        follower = self._followers.pop(sequence.id, None)
        if follower is not None:
            self.memory.free(follower.row)
