"""grouped_matmul: each form against the definition, and every row times the matrix gathered for it."""

import pytest
import torch

from kernels import dispatch, grouped_matmul, route
from tests.kernels.physics import DEVICE, chain, close, using
from tests.kernels.suite import Differentiable, wrong


def case(counts, dim, size):
    def draw():
        inputs = {
            "x_MD": torch.randn(sum(counts), dim),
            "weight_EDF": torch.randn(len(counts), dim, size) * dim**-0.5,
            "counts_E": torch.tensor(counts),
        }
        return grouped_matmul, inputs

    return draw


class TestGroupedMatmul(Differentiable):
    CASES = {
        "odd": case([20, 0, 1, 42, 0], 60, 35),
        "several-tiles": case([70, 3, 150], 33, 130),
        "one-expert": case([63], 60, 60),
        "rows-of-one": case([1, 1, 0, 1], 7, 5),
        "no-rows": case([0, 0], 6, 5),
        "empty-ends": case([0, 0, 5, 0], 16, 16),
    }
    SMALL = {"small": case([2, 0, 1], 3, 2)}


def test_each_row_meets_its_own_matrix(form):
    _, x = case([20, 0, 1, 42, 0], 60, 35)()
    x = {n: v.to(DEVICE) for n, v in x.items()}
    own = torch.arange(5, device=DEVICE).repeat_interleave(x["counts_E"])
    with using(form):
        close(grouped_matmul(**x), torch.einsum("md,mdf->mf", x["x_MD"], x["weight_EDF"][own]))


def test_transposed_weights(form):
    _, x = case([5, 2], 12, 20)()
    chain(grouped_matmul, {**x, "weight_EDF": torch.randn(2, 20, 12).mT}, form)


def test_a_mixture_of_experts(form):
    """route, dispatch and grouped_matmul together are the weighted sum of each token's experts."""
    tokens, k = torch.randn(31, 16, device=DEVICE), 2
    logits, weight = torch.randn(31, 6, device=DEVICE), torch.randn(6, 16, 24, device=DEVICE)
    with using(form):
        experts, shares = route(logits, k)
        order, counts = dispatch(experts, 6)
        y = grouped_matmul(tokens[order // k], weight, counts) * shares.flatten()[order, None]
    y = torch.zeros(31, 24, device=DEVICE).index_add_(0, order // k, y)
    every = torch.einsum("nd,edf->nef", tokens, weight)
    mixed = torch.zeros_like(logits).scatter(1, experts, shares)
    close(y, torch.einsum("nef,ne->nf", every, mixed))


@pytest.mark.slow
def test_many_rows(form):
    chain(*case([300, 0, 700, 24], 256, 192)(), form)


def test_mistakes_name_the_argument():
    _, x = case([3, 2], 4, 5)()
    wrong(grouped_matmul, x, ValueError, "counts_E must add up", counts_E=torch.tensor([3, 3]))
    wrong(grouped_matmul, x, ValueError, "counts_E must add up", counts_E=torch.tensor([6, -1]))
    wrong(grouped_matmul, x, ValueError, "counts_E", counts_E=torch.tensor([5]))
    wrong(grouped_matmul, x, TypeError, "counts_E", counts_E=torch.tensor([3.0, 2.0]))
    wrong(grouped_matmul, x, ValueError, "weight_EDF", weight_EDF=torch.randn(2, 5, 4))
    wrong(grouped_matmul, x, TypeError, "weight_EDF", weight_EDF=torch.randn(2, 4, 5).half())
    wrong(grouped_matmul, x, ValueError, "weight_EDF must be on", weight_EDF=torch.randn(2, 4, 5, device="meta"))
