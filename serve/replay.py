"""The model's part of a step without Python: recorded once, for all numbers of rows and pages, played in C++.

A call of few tokens costs less in its products than in the Python around its layers. So once calls of a kind (how many
tokens, drafts or none, padding or none) come again and again, one is recorded as a `kernels.cpu.tape`, in a thread
beside those that go on. Short prompts are padded to few lengths, so that there are few kinds of them. A model whose
path depends on numbers cannot be recorded: it runs as before. A kernel may look at them: on a tape it is one op.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kernels.attention.chunked import FEW
from kernels.cpu.tape import NotRecorded, Tape
from models.decoder import Decoder
from models.span import Span
from models.state import Pages, State

AFTER = 64  # calls of a kind before it is recorded, which takes seconds
RUNS = (8, 16, 32, 64, 128)  # prompt tokens of a row in calls that are recorded; beyond them Python is a small part
SPARE = 64  # tokens of padding that take about as long as the Python that is saved
_Key = tuple[int, bool, bool, int, bool]
_recorder = ThreadPoolExecutor(1, "recorder")
_asked: list[Future] = []  # recordings that may be under way


def recording() -> bool:
    """Whether a tape is being made in this process: whatever is timed meanwhile is slower than it will be."""
    _asked[:] = [tape for tape in _asked if not tape.done()]
    return bool(_asked)


def _submitted(make: Callable, *given: Any) -> Future:
    _asked.append(_recorder.submit(make, *given))
    return _asked[-1]


def filled(tokens: int, rows: int) -> int:
    """Tokens of each row to which a call for so many prompt tokens is padded: then it is of a kind that is recorded."""
    return next((run for run in RUNS if run >= tokens and rows * (run - tokens) <= SPARE), tokens)


class Replay:
    """`model.hidden`, and the head on all its outputs, in calls for prompts on the last one of each row.

    rows, pages: the most there are in a call.

    after: calls of a kind before it is recorded. aside: calls go on meanwhile; False: one waits for its tape.
    """

    def __init__(self, model: Decoder, rows: int, pages: int, after: int = AFTER, aside: bool = True) -> None:
        self.model, self.rows, self.pages, self.after, self.aside = model, rows, pages, after, aside
        self._seen: Counter[_Key] = Counter()
        self._tapes: dict[_Key, Future[Tape | None]] = {}

    def __call__(
        self,
        ids_BT: Tensor,
        state: State,
        segments_BT: Tensor | None,
        keep: int,
        parents_BT: Tensor | None,
        last_B1: Tensor | None = None,
    ) -> tuple[Tensor, Span, State, Tensor] | None:
        """Outputs, span, state after, logits (B, T, C); None when the call has to be run by the model itself.

        last_B1: of a call for prompts the column of each row that logits (B, 1, C) are wanted of.
        """
        rows, tokens = ids_BT.shape
        key = (tokens, rows == 1, segments_BT is None, keep, parents_BT is None)
        if not ids_BT.is_cpu or not _recordable(key):
            return None
        pages = _pages(state)
        self._seen[key] += 1
        if key not in self._tapes:
            if self._seen[key] < self.after or pages == 1 < self.pages:
                return None
            self._tapes[key] = _submitted(self._recorded, key, state)
        tape = self._tapes[key]
        player = tape.result() if tape.done() or not self.aside else None
        if player is None:
            return None
        return player(rows, pages, ids_BT, state, segments_BT, parents_BT, last_B1 if _is_prompt(key) else None)

    def ready(self, tokens: int, rows: int, keep: int, chain: bool, state: Callable[[], State]) -> bool:
        """Whether calls of such a kind, with padding or without, run as they always will; if not, recording begins.

        state: gives that of such a call, and is asked only then.
        """
        keys = [(tokens, rows == 1, whole, keep, chain) for whole in ((True, False) if tokens > 1 else (True,))]
        keys = [key for key in keys if _recordable(key)] if self.model.embedding.weight.is_cpu else []
        for key in keys:
            if key not in self._tapes:
                self._tapes[key] = _submitted(self._recorded, key, state())
        return all(self._tapes[key].done() for key in keys)

    def settled(self, tokens: int, rows: int, whole: bool, keep: int, chain: bool) -> bool:
        """Whether calls of such a kind run as they always will."""
        key = (tokens, rows == 1, whole, keep, chain)
        tape = self._tapes.get(key)
        return not _recordable(key) or not self.model.embedding.weight.is_cpu or (tape is not None and tape.done())

    @property
    def tapes(self) -> dict[_Key, Tape | None]:
        """Of each kind that came often enough its tape, None where there can be none. Waits for those being made."""
        return {key: tape.result() for key, tape in self._tapes.items()}

    def _recorded(self, key: _Key, state: State) -> Tape | None:
        tokens, alone, whole, keep, chain = key
        most = max(self.rows, 3)

        def example(rows: int, pages: int) -> tuple[Any, ...]:
            def numbers() -> Tensor:
                return torch.empty(rows, tokens, dtype=torch.int64)

            table_BN, now, shaped = torch.empty(rows, pages, dtype=torch.int64), _pages(state), {}
            ring_B1 = torch.empty(rows, 1, dtype=torch.int64)
            for name, value in state.items():
                if isinstance(value, Pages):
                    shaped[name] = Pages(value.pool, table_BN if value.table_BN.shape[1] == now > 1 else ring_B1)
                else:
                    shaped[name] = torch.empty(rows, *value.shape[1:], dtype=value.dtype)
            last_B1 = numbers()[:, :1] if _is_prompt(key) else None
            return numbers(), shaped, None if whole else numbers(), None if chain else numbers(), last_B1

        def run(
            ids_BT: Tensor,
            state: State,
            segments_BT: Tensor | None,
            parents_BT: Tensor | None,
            last_B1: Tensor | None,
        ):
            x_BTD, at, state = self.model.hidden(ids_BT, state, segments_BT, keep, parents_BT=parents_BT)
            told, where = x_BTD, at
            if last_B1 is not None:
                told = x_BTD.take_along_dim(last_B1[..., None], 1)
                where = Span(at.positions_BT.take_along_dim(last_B1, 1), ids_BT.take_along_dim(last_B1, 1))
            return x_BTD, at, state, self.model.head(told, where)[0]

        try:
            pages = (2, max(self.pages, 3)) if self.pages > 1 else (1, 1)
            return Tape(run, example, (1, 1) if alone else (2, most), pages)
        except NotRecorded:
            return None


def _is_prompt(key: _Key) -> bool:
    tokens, _, _, keep, chain = key
    return tokens > 1 and not keep and chain


def _recordable(key: _Key) -> bool:
    """Whether calls of this kind are recorded once there were many of them."""
    tokens, _, whole, *_ = key
    return tokens in RUNS and not whole if _is_prompt(key) else tokens <= FEW


def _pages(state: State) -> int:
    """Pages of a row in the tables of a call; a ring has one."""
    return max((value.table_BN.shape[1] for value in state.values() if isinstance(value, Pages)), default=1)
