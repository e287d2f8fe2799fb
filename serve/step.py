"""One call of the model: known tokens and drafts of some rows in, logits where they are wanted out, and state kept.

A call with drafts leaves its rows open: `Call.commit` says which guesses were right, and the state becomes what it
would be after those tokens alone.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoder import Decoder
from models.span import Span
from models.state import State, select
from serve.memory import StateMemory
from serve.replay import RUNS, Replay, filled, recording
from serve.scheduler import Sequence
from serve.speculative import Draft, Outputs
from serve.width import LENGTHS

_SPARSE = 0.3  # rows of different lengths share a call when at most this part of it is padding; measured on a CPU


@dataclass(slots=True)
class Part:
    """What a call computes of one sequence: its next `tokens` known tokens and, when they are the last, a draft."""

    sequence: Sequence
    tokens: int
    draft: Draft | None = None

    @property
    def columns(self) -> int:
        return self.tokens + (len(self.draft.tokens) if self.draft else 0)

    def parents(self, width: int) -> list[int]:
        """The column before each one in its line, padded to `width` columns."""
        guesses = self.draft.parents if self.draft else ()
        found = [*range(-1, self.tokens - 1), *(self.tokens + max(parent, -1) for parent in guesses)]
        return found + [-1] * (width - len(found))

    def path(self, accepted: Items[int]) -> list[int]:
        """Columns that stay when so many of the draft are accepted: those of known tokens, then the draft's."""
        return [*range(self.tokens), *(self.tokens + index for index in accepted)]

    @property
    def complete(self) -> bool:
        """Whether no known token is missing after the call, so that the next can be drawn."""
        return self.tokens == self.sequence.missing

    @property
    def wanted(self) -> int:
        """Columns, the last ones, whose logits are needed."""
        return 1 + self.columns - self.tokens if self.complete else 0


class Call:
    """What came out. parts: in the order of the logits; logits_NC: of each part's wanted columns, None when none is.

    tree: whether drafts went in as trees. usual: whether calls of this kind will take as long again.
    """

    def __init__(
        self,
        parts: Items[Part],
        x_BTD: Tensor,
        logits_NC: Tensor | None,
        state: State,
        memory: StateMemory,
        tree: bool,
        usual: bool,
    ) -> None:
        self.parts, self.x_BTD, self.logits_NC = parts, x_BTD, logits_NC
        self.tree, self.usual = tree, usual
        self._state, self._memory = state, memory
        self._rows = tuple(part.sequence.row for part in parts)
        self._drafting = any(part.draft for part in parts)
        if not self._drafting:
            memory.put(self._rows, state)

    def commit(self, paths: Items[Items[int]]) -> None:
        """paths: for each part the indices in its draft of the accepted tokens, from the root on."""
        if self._drafting:
            columns, path_BK = [part.path(path) for part, path in zip(self.parts, paths)], None
            kept_B = torch.tensor([len(path) for path in columns], device=self.x_BTD.device)
            if self.tree:
                longest = max(map(len, columns))
                filled = [path + [0] * (longest - len(path)) for path in columns]
                path_BK = torch.tensor(filled, device=self.x_BTD.device)
            self._memory.put(self._rows, select(self._state, kept_B, path_BK))

    def outputs(self, index: int, path: Items[int]) -> Outputs:
        """Of the model for the tokens of part `index` that are now computed for good."""
        return Outputs(self.x_BTD, index, self.parts[index].path(path))


class Step:
    """Runs calls of `model` on the rows of `memory`. trees: drafts are, and not just chains."""

    def __init__(self, model: Decoder, memory: StateMemory, trees: bool = False) -> None:
        self.model, self.memory, self.device = model, memory, model.embedding.weight.device
        self.trees = trees
        self.replay = Replay(model, memory.rows, memory.widest)

    def __call__(self, parts: Items[Part]) -> Call:
        rows = tuple(part.sequence.row for part in parts)
        lengths = [part.columns for part in parts]
        width, drafting = max(lengths), any(part.draft for part in parts)
        prompts = width > 1 and not drafting and self.device.type == "cpu"
        if drafting:
            width = next((length for length in LENGTHS if length >= width), width)
        elif prompts:
            width = filled(width, len(parts))
        ids = []
        for part, length in zip(parts, lengths):
            start = part.sequence.computed
            guesses = part.draft.tokens if part.draft else ()
            ids.append([*part.sequence.tokens[start : start + part.tokens], *guesses, *[0] * (width - length)])
        ids_BT, segments_BT = torch.tensor(ids, device=self.device), None
        lengths_B1 = torch.tensor(lengths, device=self.device)[:, None]
        if min(lengths) < width or (prompts and width in RUNS):
            segments_BT = -(torch.arange(width, device=self.device) >= lengths_B1).long()
        keep, parents_BT = (width if drafting else 0), None
        tree = drafting and (self.trees or any(part.draft is not None and part.draft.branches for part in parts))
        if tree:
            keep, parents_BT = 0, torch.tensor([part.parents(width) for part in parts], device=self.device)
        state = self.memory.take(rows, max(part.sequence.computed + part.columns for part in parts))
        wanted = [(row, column) for row, part in enumerate(parts)
                  for column in range(lengths[row] - part.wanted, lengths[row])]  # fmt: skip
        played = self.replay(ids_BT, state, segments_BT, keep, parents_BT, lengths_B1 - 1)
        if played is not None:
            x_BTD, _, state, logits_BTC = played
            wanted = [(row, min(column, logits_BTC.shape[1] - 1)) for row, column in wanted]
            return Call(parts, x_BTD, self._picked(logits_BTC, wanted), state, self.memory, tree, not recording())
        usual = self.replay.settled(width, len(rows), segments_BT is None, keep, parents_BT is None)
        x_BTD, at, state = self.model.hidden(ids_BT, state, segments_BT, keep, parents_BT=parents_BT)
        logits_NC = self._logits(x_BTD, at, ids_BT, wanted)
        return Call(parts, x_BTD, logits_NC, state, self.memory, tree, usual)

    def ready(self, rows: Items[int], tokens: int) -> bool:
        """Whether calls of so many tokens for each of `rows` run as fast as they ever will; sees to it that they do."""
        keep = 0 if tokens == 1 or self.trees else tokens
        chain = tokens == 1 or not self.trees
        return self.replay.ready(tokens, len(rows), keep, chain, lambda: self.memory.take(tuple(rows)))

    def ready_for_prompts(self, rows: Items[int], longest: int) -> bool:
        """The same of calls for a prompt of at most so many tokens in each of `rows`."""
        runs = [run for run in RUNS if run <= filled(longest, 1)]
        return all([self.replay.ready(run, len(rows), 0, True, lambda: self.memory.take(tuple(rows))) for run in runs])

    def onward(self, ids_B1: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, C) after one more token of each row, and the state then, which is the caller's to keep or drop."""
        played = self.replay(ids_B1, state, None, 0, None)
        if played is not None:
            return played[3][:, 0], played[2]
        x_B1D, at, state = self.model.hidden(ids_B1, state)
        return self.model.head(x_B1D, at)[0][:, 0], state

    def _picked(self, logits_BTC: Tensor, wanted: list[tuple[int, int]]) -> Tensor | None:
        """Logits at the wanted places, (N, C), in their order."""
        if not wanted:
            return None
        if len(wanted) == logits_BTC.shape[0] * logits_BTC.shape[1]:
            return logits_BTC.flatten(0, 1)
        row_N, column_N = torch.tensor(wanted, device=self.device).unbind(1)
        return logits_BTC[row_N, column_N]

    def _logits(self, x_BTD: Tensor, at: Span, ids_BT: Tensor, wanted: list[tuple[int, int]]) -> Tensor | None:
        if not wanted:
            return None
        if x_BTD.shape[1] > 1 or len(wanted) < len(x_BTD):
            row_N, column_N = torch.tensor(wanted, device=self.device).unbind(1)
            at = Span(at.positions_BT[row_N, column_N][:, None], ids_BT[row_N, column_N][:, None])
            x_BTD = x_BTD[row_N, column_N][:, None]
        return self.model.head(x_BTD, at)[0][:, 0]


def grouped(parts: Items[Part], alone: bool = False) -> list[list[Part]]:
    """One call each: the next tokens with their drafts together, the longer runs with others of similar length.

    alone: every part by itself, so that its numbers come from calls of the same sizes whoever else is there.
    """
    if alone:
        return [[part] for part in parts]
    groups = [[part for part in parts if part.tokens == 1]]
    total = 0
    for part in sorted((part for part in parts if part.tokens > 1), key=lambda part: -part.tokens):
        group = groups[-1]
        if len(groups) > 1 and total + part.tokens >= (1 - _SPARSE) * group[0].tokens * (len(group) + 1):
            group.append(part)
            total += part.tokens
        else:
            groups.append([part])
            total = part.tokens
    return [group for group in groups if group]
