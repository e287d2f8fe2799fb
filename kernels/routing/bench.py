"""Routing: bound by reading the logits; torch's own needs a softmax, a topk and the passes between."""

from collections.abc import Iterator
from functools import partial

import torch

from kernels import route
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """Logits in, k experts and weights out; backward the other way."""

    def topk(logits_NE, k):
        weights, experts = logits_NE.float().softmax(-1).topk(k, -1)
        return experts, weights / weights.sum(-1, keepdim=True)

    for tokens, count, k in ((65536, 256, 8), (65536, 64, 6)) if bench.gpu else ((2048, 256, 8), (8192, 64, 2)):
        plain = partial(topk, k=k)
        yield Case(
            f"N{tokens} E{count} k{k}",
            lambda tokens=tokens, count=count: {"logits_NE": bench.randn(tokens, count).float()},
            partial(route, k=k),
            0,
            tokens * (4 * count + 12 * k),
            backward=2,
            peers={"topk": plain} | ({"compiled": torch.compile(plain)} if bench.gpu else {}),
        )
