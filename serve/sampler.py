"""Sampling the next token of each row, with random numbers that belong to the request and not to the batch.

The number that picks the token at position i of a request with seed s is a hash of (s, i). So a stream is the same in
any batch, after a preemption, and resumed on another machine. The distribution is inverted in vocabulary order, row by
row; no row's path depends on what the other rows ask for.

top-p needs no sorting: a token is outside of the nucleus exactly when likelier ones have mass p together, which is one
sum. Then all that are no likelier are outside too, and the next draw is made without them and with a new number. The
result is exact, and at most 1/p draws are expected.

Log probabilities are the model's own: of its logits, before penalties, temperature, top_k and top_p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.largest import argmax, largest

MOST_LOGPROBS = 20
_MASK = (1 << 64) - 1
_BLOCK = 256  # sums of so many tokens are searched first: one pass over the vocabulary instead of a cumulative sum


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn and when it ends.

    max_tokens:  tokens to generate at most; 0: the prompt is computed, and no more.
    temperature: 0 takes the likeliest token.
    top_k:       draw among the k likeliest tokens; 0 for all. Applied before top_p.
    top_p:       draw among the likeliest tokens that together have this probability.
    min_p:       draw among tokens that have at least this part of the likeliest one's probability; applied first.
    seed:        0 <= seed < 2^64; None draws one.
    stop:        texts that end the completion and are not part of it.
    ignore_eos:  go on after an end token.
    frequency_penalty: taken off a token's logit for each time it was generated.
    presence_penalty:  taken off a token's logit once it was generated.
    repetition_penalty: positive logits of tokens of the prompt and the completion are divided by it, others multiplied.
    logit_bias:  pairs of a token and what is added to its logit.
    min_tokens:  tokens before an end token may come.
    stop_token_ids: further end tokens, which end the completion also with ignore_eos.
    grammar:     that the completion follows (`serve.grammar`); none when empty.
    logprobs:    tokens whose log probabilities are told at each position, besides the one drawn; None for not even it.
    prompt_logprobs: the same of the prompt's tokens, for which all of it is computed, whatever the prefix cache has.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    grammar: str = ""
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 0")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed <= _MASK:
            raise ValueError(f"seed={self.seed}: must be at least 0 and below 2^64")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r}: must be a list of texts, none of them empty")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)}: must be between -2 and 2")
        if not 0.01 <= self.repetition_penalty <= 10:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: must be between 0.01 and 10")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: must be between 0 and 1")
        if not all(-100 <= value <= 100 for _, value in self.logit_bias):
            raise ValueError("logit_bias: must be between -100 and 100")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must be between 0 and max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= MOST_LOGPROBS:
                raise ValueError(f"{name}={getattr(self, name)}: must be between 0 and {MOST_LOGPROBS}")

    @property
    def penalized(self) -> bool:
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    @property
    def shaped(self) -> bool:
        """Whether logits are changed before a token is drawn (`serve.shaping`)."""
        return bool(self.penalized or self.logit_bias or self.min_tokens or self.grammar)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """token: of the token that stands there. top: the likeliest tokens with theirs, the likeliest first."""

    token: float
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """A number in [0, 1) for draw `draw` at `position` of a stream: the splitmix64 finaliser over each in turn."""
    return (_mix(_mix(_mix(seed) + position) + draw) >> 12) * 2.0**-52


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits_BC: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """One token id per row.

    samplings: of each row, with a seed unless its temperature is 0. positions: of the token in its completion.
    """
    random = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if len(random) < len(samplings):
        tokens = argmax(logits_BC).tolist()
        if not random:
            return tokens
        logits_BC = logits_BC[torch.tensor(random, device=logits_BC.device)]
    else:
        tokens = [0] * len(samplings)
    own = [samplings[row] for row in random]
    weights_NC = _weights(logits_BC, own)
    # Likelier tokens of this mass put a token outside of the nucleus; where top_k has cut, top_p has too.
    p = [s.top_p if s.top_p < 1 and not 0 < s.top_k < logits_BC.shape[1] else float("inf") for s in own]
    limit_N = weights_NC.new_tensor(p) * weights_NC.sum(-1)
    rows, draw = random, 0
    while True:
        drawn_N = _invert(weights_NC, [uniform(samplings[row].seed, positions[row], draw) for row in rows])
        for row, token in zip(rows, drawn_N.tolist()):
            tokens[row] = token
        if min(p) > 1:
            return tokens
        least_N1 = weights_NC.gather(1, drawn_N[:, None])
        _cut(weights_NC, least_N1)
        mass_N = weights_NC.sum(-1)
        # Nothing is likelier than the top token: it stays, also when top_p is so small that its limit is 0 in fp32.
        outside_M = ((mass_N >= limit_N) & (mass_N > 0)).nonzero()[:, 0]
        if not len(outside_M):
            return tokens
        weights_NC, limit_N = weights_NC[outside_M], limit_N[outside_M]
        rows, draw = [rows[index] for index in outside_M.tolist()], draw + 1


def logprobs(logits_BC: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> list[Logprobs | None]:
    """Log probabilities at one position of each row. tokens: that stand there. counts: of the likeliest, None: none."""
    found: list[Logprobs | None] = [None] * len(counts)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return found
    logits_NC = logits_BC[torch.tensor(rows, device=logits_BC.device)].float()
    total_N1 = logits_NC.logsumexp(-1, keepdim=True)
    drawn_N1 = torch.tensor([[tokens[row]] for row in rows], device=logits_NC.device)
    top_NK, ids_NK = largest(logits_NC, min(max(counts[row] for row in rows), logits_NC.shape[1]))
    own_N1 = logits_NC.gather(1, drawn_N1) - total_N1
    table = zip(rows, own_N1[:, 0].tolist(), ids_NK.tolist(), (top_NK - total_N1).tolist())
    for row, own, ids, values in table:
        found[row] = Logprobs(own, tuple(zip(ids, values))[: counts[row]])
    return found


def _weights(logits_NC: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Unnormalised probabilities (N, C, zeros up to whole blocks) fp32; 0 for what min_p, top_k and then top_p cut."""
    rows, classes = logits_NC.shape
    top_N1 = logits_NC.amax(-1, keepdim=True).float()
    if not bool(top_N1.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or training diverged")
    weights_NC = top_N1.new_empty(rows, -(-classes // _BLOCK) * _BLOCK)
    weights_NC[:, classes:] = 0.0
    temperature_N1 = top_N1.new_tensor([[sampling.temperature] for sampling in samplings]).clamp(min=1e-30)
    # The maximum goes first: a tiny temperature may then overflow only to -inf, which has weight 0.
    own_NC = weights_NC[:, :classes]
    own_NC.copy_(logits_NC).sub_(top_N1).div_(temperature_N1).exp_()
    if any(0 < sampling.top_k < classes or sampling.min_p for sampling in samplings):
        _cut(weights_NC, torch.nextafter(_least(own_NC, samplings), top_N1.new_tensor(-1.0)))
    return weights_NC


def _least(weights_NC: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """(N, 1): the smallest weight that min_p, top_k and, where top_k cuts, top_p let in. The largest weight is 1."""
    least_N1 = weights_NC.new_tensor([[sampling.min_p] for sampling in samplings])
    cut = [row for row, sampling in enumerate(samplings) if 0 < sampling.top_k < weights_NC.shape[1]]
    if cut:
        cut_M = torch.tensor(cut, device=weights_NC.device)
        k_M1 = torch.tensor([[samplings[row].top_k] for row in cut], device=weights_NC.device)
        p_M1 = weights_NC.new_tensor([[samplings[row].top_p] for row in cut])
        own_MC = weights_NC if len(cut) == len(samplings) else weights_NC[cut_M]
        top_MK, _ = largest(own_MC, max(samplings[row].top_k for row in cut))
        top_MK = torch.where(top_MK >= least_N1[cut_M], top_MK, 0.0)
        mass_MK = top_MK.cumsum(-1)
        nucleus_M1 = (mass_MK < p_M1 * mass_MK.gather(1, k_M1 - 1)).sum(-1, keepdim=True) + 1
        keep_M1 = torch.where(p_M1 < 1, torch.minimum(nucleus_M1, k_M1), k_M1)
        least_N1[cut_M] = torch.maximum(least_N1[cut_M], top_MK.gather(1, keep_M1 - 1))
    return least_N1


def _cut(weights_NC: Tensor, most_N1: Tensor) -> None:
    """Weights of at most `most` become 0. Row by row on a CPU, where a comparison of all takes many times as long."""
    if weights_NC.device.type != "cpu":
        weights_NC.masked_fill_(weights_NC <= most_N1, 0.0)
        return
    for weights_C, most in zip(weights_NC, most_N1[:, 0].tolist()):
        F.threshold_(weights_C, most, 0.0)


def _invert(weights_NC: Tensor, u_N: Sequence[float]) -> Tensor:
    """The token at part u of each row's mass, (N,) int64; its weight is never 0."""
    blocks_NKS = weights_NC.unflatten(-1, (-1, _BLOCK))
    # float64, and 52 random bits, so that u * total is always below the total.
    sums_NK = blocks_NKS.sum(-1).cumsum(-1, dtype=torch.float64)
    target_N1 = sums_NK.new_tensor(u_N)[:, None] * sums_NK[:, -1:]
    block_N1 = torch.searchsorted(sums_NK, target_N1, right=True)
    before_N1 = F.pad(sums_NK, (1, 0)).gather(1, block_N1)
    rows_N = torch.arange(len(u_N), device=weights_NC.device)
    inner_NS = blocks_NKS[rows_N, block_N1[:, 0]].cumsum(-1, dtype=torch.float64)
    # Rounded differently, the block may end a hair before the target: then its last token with any weight is meant.
    last_N1 = torch.searchsorted(inner_NS, inner_NS[:, -1:].contiguous())
    inside_N1 = torch.searchsorted(inner_NS, target_N1 - before_N1, right=True)
    return (block_N1 * _BLOCK + torch.minimum(inside_N1, last_N1))[:, 0]
