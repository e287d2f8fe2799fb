"""segment_reduce: each form against the definition, torch's scatter, and what equals share."""

from functools import partial

import pytest
import torch

from kernels import segment_reduce
from tests.kernels.physics import DEVICE, chain, close, using
from tests.kernels.suite import Differentiable, wrong


def case(edges, count, dim, reduce, lowest=0):
    def draw():
        inputs = {"x_ED": torch.randn(edges, dim), "segments_E": torch.randint(lowest, max(count, 1), (edges,))}
        return partial(segment_reduce, count=count, reduce=reduce), inputs

    return draw


class TestSegmentReduce(Differentiable):
    CASES = {
        **{f"odd-{r}": case(63, 20, 60, r, lowest=3) for r in ("sum", "mean", "max")},  # some segments are empty
        **{f"one-segment-{r}": case(63, 1, 5, r) for r in ("sum", "mean", "max")},
        **{f"no-rows-{r}": case(0, 3, 4, r) for r in ("sum", "max")},
        "wide": case(9, 3, 150, "max"),
        "no-segments": case(0, 0, 4, "mean"),
    }
    SMALL = {r: case(6, 4, 2, r) for r in ("sum", "mean", "max")}


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_is_torchs_scatter(reduce, form):
    x, segments = torch.randn(200, 8, device=DEVICE), torch.randint(0, 30, (200,), device=DEVICE)
    segments[segments == 7] = 8
    theirs = torch.zeros(30, 8, device=DEVICE).scatter_reduce(
        0, segments[:, None].expand_as(x), x, {"max": "amax"}.get(reduce, reduce), include_self=False
    )
    with using(form):
        y = segment_reduce(x, segments, 30, reduce=reduce)
    close(y, theirs)
    assert (y[7] == 0).all()


def test_equals_share_the_gradient_of_a_maximum(form):
    x = torch.tensor([[2.0], [2.0], [1.0], [-5.0], [2.0], [-5.0]])
    found = chain(
        partial(segment_reduce, count=2, reduce="max"),
        {"x_ED": x, "segments_E": torch.tensor([0, 0, 0, 1, 0, 1])},
        form,
    )
    d = found["gradient of x_ED"][:, 0]
    assert d[0] == d[1] == d[4] != 0 and d[2] == 0 and d[3] == d[5] != 0
    assert found["output 0"].flatten().tolist() == [2.0, -5.0]


def test_sorted_by_segment_or_not_is_the_same(form):
    x, segments = torch.randn(90, 5, device=DEVICE), torch.randint(0, 9, (90,), device=DEVICE)
    order = segments.argsort(stable=True)
    with using(form):
        for reduce in ("sum", "mean", "max"):
            one = segment_reduce(x, segments, 9, reduce=reduce)
            assert torch.equal(one, segment_reduce(x[order], segments[order], 9, reduce=reduce))


def test_mistakes_name_the_argument():
    x = {"x_ED": torch.randn(3, 4), "segments_E": torch.tensor([0, 1, 1]), "count": 2}
    wrong(segment_reduce, x, ValueError, "segments_E must be 0..1", segments_E=torch.tensor([0, 2, 1]))
    wrong(segment_reduce, x, ValueError, "segments_E must be 0..1", segments_E=torch.tensor([0, -1, 1]))
    wrong(segment_reduce, x, ValueError, "segments_E must be", segments_E=torch.tensor([0, 1]))
    wrong(segment_reduce, x, TypeError, "segments_E", segments_E=torch.tensor([0.0, 1.0, 1.0]))
    wrong(segment_reduce, x, ValueError, "reduce", reduce="min")
    wrong(segment_reduce, x, TypeError, "count", count=2.0)
    wrong(segment_reduce, x, ValueError, "segments_E must be on", segments_E=torch.zeros(3, device="meta").long())
