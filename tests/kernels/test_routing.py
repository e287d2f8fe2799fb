"""route and dispatch: each form against the definition, exact choices, and what ties, biases and groups do."""

from functools import partial

import pytest
import torch

from kernels import dispatch, route
from tests.kernels.physics import DEVICE, close, using
from tests.kernels.suite import Differentiable, wrong


def case(tokens, count, k, bias=False, **options):
    def draw():
        inputs = {"logits_NE": torch.randn(tokens, count) * 2}
        if bias:
            inputs["bias_E"] = torch.randn(count) * 0.3
        return partial(route, k=k, **options), inputs

    return draw


class TestRoute(Differentiable):
    CASES = {
        "softmax": case(63, 60, 6),
        "raw": case(63, 60, 6, normalize=False),
        "sigmoid": case(63, 60, 3, score="sigmoid"),
        "sigmoid-raw": case(63, 60, 3, score="sigmoid", normalize=False),
        "bias": case(63, 60, 6, bias=True, score="sigmoid"),
        "groups": case(63, 60, 6, bias=True, groups=6, best_groups=2, score="sigmoid"),
        "groups-softmax": case(33, 16, 2, groups=4, best_groups=3),
        "groups-of-one": case(33, 5, 2, groups=5, best_groups=3),
        "one-of-one": case(3, 1, 1),
        "all": case(5, 7, 7, normalize=False),
        "no-tokens": case(0, 60, 6),
    }
    SMALL = {
        "softmax": case(3, 5, 2),
        "sigmoid": case(3, 6, 2, bias=True, groups=3, best_groups=2, score="sigmoid"),
        "raw": case(3, 5, 2, normalize=False),
    }


def test_equals_go_to_the_lower_number(form):
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    for options in ({}, {"bias_E": torch.zeros(5, device=DEVICE)}, {"score": "sigmoid"}):
        with using(form):
            experts, weights = route(logits, 3, **options)
        assert experts.tolist() == [[1, 3, 4], [0, 1, 2]]
        close(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_that_round_to_equals_are_told_apart(score, form):
    logits = torch.tensor([[100.0, 150.0, 300.0, -300.0, -200.0]], device=DEVICE)
    with using(form):
        experts, weights = route(logits, 5, score=score)
    assert experts.tolist() == [[2, 1, 0, 4, 3]] and weights.isfinite().all()


def test_masked_experts_come_last(form):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0]], device=DEVICE)
    with using(form):
        experts, weights = route(logits, 3)
    assert experts.tolist() == [[1, 3, 0]] and weights[0, 2] == 0


def test_a_bias_moves_the_choice_and_not_the_weights(form):
    logits = torch.randn(40, 8, device=DEVICE)
    bias = torch.zeros(8, device=DEVICE)
    bias[3] = 5.0
    with using(form):
        experts, weights = route(logits, 2, bias_E=bias, score="sigmoid", normalize=False)
    assert (experts[:, 0] == 3).all()
    close(weights, logits.sigmoid().gather(1, experts))


def test_groups_close_the_best_expert_of_a_poor_group(form):
    logits = torch.tensor([[0.9, 0.01, 0.6, 0.5]], device=DEVICE).logit()
    with using(form):
        assert route(logits, 1, score="sigmoid")[0].item() == 0
        assert route(logits, 1, groups=2, score="sigmoid")[0].item() == 2


def test_dispatch_brings_the_rows_of_an_expert_together():
    experts = torch.randint(0, 9, (50, 3), device=DEVICE)
    experts[experts == 4] = 5
    order, counts = dispatch(experts, 9)
    assert counts.tolist() == [(experts == e).sum().item() for e in range(9)] and counts[4] == 0
    flat, at = experts.flatten(), 0
    for e, n in enumerate(counts.tolist()):
        assert order[at : at + n].tolist() == (flat == e).nonzero()[:, 0].tolist()
        at += n
    order, counts = dispatch(experts[:0], 9)
    assert order.numel() == 0 and counts.tolist() == [0] * 9
    order, counts = dispatch(experts + 40000, 40009)
    assert torch.equal(flat[order] + 40000, (flat + 40000).sort().values) and counts[40000:].sum() == 150


def test_mistakes_name_the_argument():
    x = {"logits_NE": torch.randn(3, 8), "k": 2}
    wrong(route, x, ValueError, "k=9", k=9)
    wrong(route, x, ValueError, "k=3", k=3, groups=4)
    wrong(route, x, ValueError, "groups=3", groups=3)
    wrong(route, x, ValueError, "best_groups=3", groups=2, best_groups=3)
    wrong(route, x, ValueError, "score", score="tanh")
    wrong(route, x, ValueError, "bias_E", bias_E=torch.randn(7))
    wrong(route, x, TypeError, "logits_NE", logits_NE=torch.ones(3, 8).long())
    wrong(dispatch, {"experts_Nk": torch.zeros(3, 2), "count": 4}, TypeError, "experts_Nk")
    wrong(dispatch, {"experts_Nk": torch.zeros(3, 2).long(), "count": 0}, ValueError, "count")
