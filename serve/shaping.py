"""What a request does to its logits before a token is drawn: bias, ends that come too early, penalties, a grammar.

All of it is a function of the logits and the tokens so far, so it is the same whether those tokens were generated one
by one, guessed by a draft and checked together, or replayed on another machine. In this order:

    l += bias;   l[ends] = -inf before min_tokens;   l = l / r if l > 0 else l * r for tokens of prompt and completion;
    l -= frequency * count + presence * [count > 0];   l = -inf for what the grammar forbids

Where a grammar has nothing but an end, it comes also before min_tokens.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from serve.grammar import Matcher
from serve.sampler import Sampling


class Shaper:
    """Of one request. prompt, generated: its tokens until now. ends: end tokens. matcher: of its grammar."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Items[int] = (),
        generated: Items[int] = (),
        ends: Iterable[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling, self.matcher = sampling, matcher
        self.generated = len(generated)
        self.ends = np.array(sorted({*ends, *sampling.stop_token_ids}), dtype=np.int64)
        self.bias = (
            np.array([token for token, _ in sampling.logit_bias], dtype=np.int64),
            np.array([value for _, value in sampling.logit_bias], dtype=np.float32),
        )
        self._tally = Tally() if sampling.penalized else None
        if self._tally is not None:
            if sampling.repetition_penalty != 1:
                self._tally.add(prompt, times=0)
            self._tally.add(generated)
        if matcher is not None:
            matcher.push(generated)

    def push(self, token: int) -> None:
        """`token` was generated, and is not the end."""
        self.generated += 1
        if self._tally is not None:
            self._tally.add((token,))
        if self.matcher is not None:
            self.matcher.push((token,))

    @property
    def finished(self) -> bool:
        """Whether the grammar has nothing more to say."""
        return self.matcher is not None and self.matcher.finished

    def early(self, ahead: Items[int]) -> bool:
        """Whether it may not end yet, with `ahead` after what was pushed."""
        return self.generated + len(ahead) < self.sampling.min_tokens

    def counted(self, ahead: Items[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens that penalties know and how often each came, with `ahead` after what was pushed."""
        return None if self._tally is None else self._tally.counted(ahead)


class Tally:
    """Tokens and how often they came, in arrays that grow."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.empty(64, np.int64), np.empty(64, np.float32)

    def add(self, tokens: Items[int], times: int = 1) -> None:
        for token in tokens:
            place = self._places.get(token)
            if place is not None:
                self._counts[place] += times
                continue
            place = self._places[token] = len(self._places)
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token, times

    def counted(self, ahead: Items[int]) -> tuple[np.ndarray, np.ndarray]:
        size = len(self._places)
        ids, counts = self._ids[:size], self._counts[:size]
        if not ahead:
            return ids, counts
        counts, more = counts.copy(), {}
        for token in ahead:
            place = self._places.get(token)
            if place is None:
                more[token] = more.get(token, 0) + 1
            else:
                counts[place] += 1
        return np.append(ids, np.array([*more], np.int64)), np.append(counts, np.array([*more.values()], np.float32))


def shape(logits_NC: Tensor, wanted: Items[tuple[Shaper | None, Items[int]]]) -> Tensor:
    """Shaped logits. wanted: for each row whose they are and the tokens ahead of those that were pushed.

    Rows without a shaper stay as they are, to the bit. `logits_NC` itself is never changed.
    """
    rows = [(row, shaper, ahead) for row, (shaper, ahead) in enumerate(wanted) if shaper is not None]
    if not rows:
        return logits_NC
    own_NC = logits_NC.to(torch.float32, copy=True)
    _add_bias(own_NC, rows)
    _penalize(own_NC, rows)
    for row, shaper, ahead in rows:
        if shaper.matcher is not None:
            allowed_C = shaper.matcher.allowed(own_NC.shape[1], ahead)
            if allowed_C is not None:
                forbidden_C = ~allowed_C.to(own_NC.device)
                own_NC[row].masked_fill_(forbidden_C, float("-inf"))
                if shaper.early(ahead) and not bool(own_NC[row].isfinite().any()):  # the grammar has but an end here
                    own_NC[row] = logits_NC[row].masked_fill(forbidden_C, float("-inf"))
    return own_NC


_Rows = list[tuple[int, Shaper, Items[int]]]


def _add_bias(logits_NC: Tensor, rows: _Rows) -> None:
    """And no end before it is time."""
    parts = [(row, *shaper.bias) for row, shaper, _ in rows if len(shaper.bias[0])]
    if parts:
        row_M, id_M, (bias_M,) = _flat(parts, logits_NC)
        logits_NC[row_M, id_M] += bias_M
    early = [(row, shaper.ends) for row, shaper, ahead in rows if shaper.early(ahead)]
    if early:
        row_M, id_M, _ = _flat(early, logits_NC)
        logits_NC[row_M, id_M] = float("-inf")


def _penalize(logits_NC: Tensor, rows: _Rows) -> None:
    parts, constants = [], []
    for row, shaper, ahead in rows:
        found = shaper.counted(ahead)
        if found is not None and len(found[0]):
            parts.append((row, *found))
            sampling = shaper.sampling
            own = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
            constants.append(np.array(own, np.float32).repeat(len(found[0])).reshape(3, -1))
    if not parts:
        return
    row_M, id_M, (count_M,) = _flat(parts, logits_NC)
    repetition_M, frequency_M, presence_M = _tensor(np.concatenate(constants, 1), logits_NC)
    value_M = logits_NC[row_M, id_M]
    value_M = torch.where(value_M > 0, value_M / repetition_M, value_M * repetition_M)
    logits_NC[row_M, id_M] = value_M - (frequency_M * count_M + presence_M * (count_M > 0))


def _flat(parts: Items[tuple], like: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows, ids and further columns of parts (row, ids, ...), one after the other."""
    rows = np.repeat([part[0] for part in parts], [len(part[1]) for part in parts])
    columns = [np.concatenate(column) for column in list(zip(*parts))[1:]]
    return _tensor(rows, like), _tensor(columns[0], like), [_tensor(column, like) for column in columns[1:]]


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
