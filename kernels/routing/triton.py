"""Routing on a GPU: a token's scores stay on chip from the logits to the choice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.routing.reference import EPS

SAVED = 1


def forward(
    logits_NE: Tensor, bias_E: Tensor | None, k: int, groups: int, best: int, score: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked`."""
    logits_NE = logits_NE.contiguous()
    tokens, count = logits_NE.shape
    experts_Nk = logits_NE.new_empty(tokens, k, dtype=torch.int64)
    weights_Nk = logits_NE.new_empty(tokens, k, dtype=torch.float32)
    bias_E = None if bias_E is None else bias_E.contiguous()
    block, lines, warps = _tile(count)
    launch(
        _choose, (triton.cdiv(tokens, lines),), logits_NE, bias_E, experts_Nk, weights_Nk, tokens,
        count, k, triton.next_power_of_2(k), groups, triton.next_power_of_2(groups), best, count // groups, EPS,
        block, lines, score == "sigmoid", normalize, num_warps=warps,
    )  # fmt: skip
    return weights_Nk, experts_Nk, experts_Nk.int()


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    logits_NE, bias_E, k, _, _, score, normalize = args
    found = []
    if needs[0]:
        logits_NE = logits_NE.contiguous()
        (tokens, count), d_NE = logits_NE.shape, torch.empty_like(logits_NE)
        block, lines, warps = _tile(count)
        launch(
            _slope, (triton.cdiv(tokens, lines),), logits_NE, outputs[0], grads[0].contiguous(), d_NE, tokens,
            count, k, EPS, block, lines, score == "sigmoid", normalize, num_warps=warps,
        )  # fmt: skip
        found.append(d_NE)
    return found + ([torch.zeros_like(bias_E)] if needs[1] else [])


def _tile(count: int) -> tuple[int, int, int]:
    """Experts and tokens of a tile, and warps: few tokens, for a token's choices follow one another."""
    block = triton.next_power_of_2(count)
    return block, max(1, min(16, 1024 // block)), 4


@triton.jit
def _scores(logits, line, e, inside, E: tl.constexpr, SIGMOID: tl.constexpr):
    z = tl.load(logits + line[:, None] * E + e[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = tl.where(inside, tl.sigmoid(z), 0.0)
    else:
        top = tl.max(z, 1)
        score = tl.exp(z - tl.where(top == float("-inf"), 0.0, top)[:, None])
        score = score / tl.maximum(tl.sum(score, 1), 1e-30)[:, None]
    return z, score


@triton.jit
def _first(choice, alive, column, NONE: tl.constexpr):
    """The column of the largest number that is alive, the first of equals, and that number."""
    best = tl.max(tl.where(alive, choice, float("-inf")), 1)
    return tl.min(tl.where(alive & (choice == best[:, None]), column[None, :], NONE), 1), best


@triton.jit
def _choose(
    logits, bias, experts, weights, N,
    E: tl.constexpr, K: tl.constexpr, KBLOCK: tl.constexpr, GROUPS: tl.constexpr, GBLOCK: tl.constexpr,
    BEST: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    e = tl.arange(0, BLOCK)
    inside = (line < N)[:, None] & (e < E)[None, :]
    z, score = _scores(logits, line, e, inside, E, SIGMOID)
    choice = z
    biased = score
    if bias is not None:
        biased = score + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        choice = biased
    alive = inside
    if BEST < GROUPS:
        g = tl.arange(0, GBLOCK)
        value = tl.full((LINES, GBLOCK), float("-inf"), tl.float32)
        for group in range(GROUPS):
            members = inside & (e // SIZE == group)[None, :]
            at, one = _first(biased, members, e, BLOCK)
            after, two = _first(biased, members & (e[None, :] != at[:, None]), e, BLOCK)
            if SIZE > 1:
                one += two
            value = tl.where((g == group)[None, :], one[:, None], value)
        waiting = tl.broadcast_to((g < GROUPS)[None, :], (LINES, GBLOCK))
        alive = inside & (e < 0)[None, :]
        for _ in range(BEST):
            opened, highest = _first(value, waiting, g, GBLOCK)
            waiting = waiting & (g[None, :] != opened[:, None])
            alive = alive | (inside & (e[None, :] // SIZE == opened[:, None]))
    k = tl.arange(0, KBLOCK)
    chosen = tl.zeros((LINES, KBLOCK), tl.int32)
    weight = tl.zeros((LINES, KBLOCK), tl.float32)
    for i in range(K):
        at, highest = _first(choice, alive, e, BLOCK)
        here = e[None, :] == at[:, None]
        alive = alive & (e[None, :] != at[:, None])
        chosen = tl.where((k == i)[None, :], at[:, None], chosen)
        weight = tl.where((k == i)[None, :], tl.sum(tl.where(here, score, 0.0), 1)[:, None], weight)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 1) + EPS)[:, None]
    inside = (line < N)[:, None] & (k < K)[None, :]
    at = line[:, None] * K + k[None, :]
    tl.store(experts + at, chosen.to(tl.int64), mask=inside)
    tl.store(weights + at, weight, mask=inside)


@triton.jit
def _slope(
    logits, experts, dweights, dlogits, N,
    E: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    e = tl.arange(0, BLOCK)
    inside = (line < N)[:, None] & (e < E)[None, :]
    _, score = _scores(logits, line, e, inside, E, SIGMOID)
    d = tl.zeros((LINES, BLOCK), tl.float32)
    chosen = tl.zeros((LINES, BLOCK), tl.float32)
    for i in range(K):
        at = tl.load(experts + line * K + i, mask=line < N, other=-1)
        here = e[None, :] == at[:, None]
        chosen += tl.where(here, 1.0, 0.0)
        d += tl.where(here, tl.load(dweights + line * K + i, mask=line < N, other=0.0)[:, None], 0.0)
    if NORMALIZE:
        total = (tl.sum(score * chosen, 1) + EPS)[:, None]
        d = chosen * (d - tl.sum(d * score, 1)[:, None] / total) / total
    if SIGMOID:
        d = d * score * (1.0 - score)
    else:
        d = score * (d - tl.sum(d * score, 1)[:, None])
    tl.store(dlogits + line[:, None] * E + e[None, :], d.to(dlogits.dtype.element_ty), mask=inside)
