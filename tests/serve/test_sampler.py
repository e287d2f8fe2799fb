"""Draws follow the distribution, are cut exactly, and depend on nothing but the row's own logits, seed and position."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.largest import argmax, largest
from serve.sampler import Sampling, sample, uniform


def drawn(logits_C, sampling: Sampling, n: int) -> torch.Tensor:
    """Counts of `n` draws at positions 0..n-1 of one seed."""
    tokens = sample(logits_C.expand(n, -1), [sampling] * n, range(n))
    return torch.bincount(torch.tensor(tokens), minlength=len(logits_C)).double()


def expected(logits_C, sampling: Sampling) -> torch.Tensor:
    """The definition, one token at a time, in float64."""
    probs = (logits_C.double() / sampling.temperature).softmax(0)
    probs[probs < sampling.min_p * probs.max()] = 0
    order = probs.argsort(descending=True)
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, mass, kept = probs[order].sum(), 0.0, []
    for token in order.tolist():
        kept.append(token)
        mass += probs[token]
        if mass >= sampling.top_p * total:
            break
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
        {"min_p": 0.1},
        {"min_p": 0.03, "top_p": 0.9, "temperature": 2.0},
        {"min_p": 0.05, "top_k": 8, "top_p": 0.8},
    ],
    ids=str,
)
def test_chi_square(options):
    logits_C = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 1.5
    sampling = Sampling(seed=11, **options)
    n = 20000
    want = expected(logits_C, sampling) * n
    counts = drawn(logits_C, sampling, n)
    assert counts[want == 0].sum() == 0
    inside = want > 0
    chi2 = ((counts - want)[inside] ** 2 / want[inside]).sum().item()
    freedom = int(inside.sum()) - 1
    # Wilson-Hilferty: the cube root of chi2 / freedom is nearly normal. 4 sigma, and the seed is fixed.
    spread = 2 / (9 * freedom)
    assert abs((chi2 / freedom) ** (1 / 3) - (1 - spread)) < 4 * math.sqrt(spread)


def test_uniform_numbers_are_uniform_and_independent():
    for numbers in ([uniform(7, i) for i in range(20000)], [uniform(s, 3) for s in range(20000)]):
        x = torch.tensor(numbers, dtype=torch.float64)
        assert 0 <= x.min() and x.max() < 1
        counts = torch.histc(x, 50, 0, 1)
        assert ((counts - 400) ** 2 / 400).sum() < 49 + 4 * math.sqrt(98)
        assert abs(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1]) < 4 / math.sqrt(len(x))
    assert uniform(1, 0) != uniform(0, 1)
    assert len({uniform(s, i) for s in range(100) for i in range(100)}) == 10000


options = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-40, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 300, 5000]),
    min_p=st.sampled_from([0.0, 0.01, 1.0]),
    top_p=st.sampled_from([1e-46, 1e-9, 0.5, 0.99, 0.999999999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(options, st.integers(0, 10**6)), min_size=1, max_size=8),
    st.sampled_from([5, 700]),
    st.integers(0, 99),
)
def test_a_row_draws_the_same_in_any_batch(rows, classes, seed):
    logits_BC = torch.randn(len(rows), classes, generator=torch.Generator().manual_seed(seed)) * 3
    samplings, positions = zip(*rows)
    together = sample(logits_BC, samplings, positions)
    alone = [sample(logits_BC[i : i + 1], [s], [p])[0] for i, (s, p) in enumerate(rows)]
    backwards = sample(logits_BC.flip(0), samplings[::-1], positions[::-1])[::-1]
    assert together == alone == backwards
    for logits_C, sampling, token in zip(logits_BC, samplings, together):
        if sampling.temperature in (0.0, 1e-40) or sampling.top_k == 1 or sampling.top_p <= 1e-9:
            assert token == logits_C.argmax()
        if sampling.top_k:
            assert (logits_C > logits_C[token]).sum() < sampling.top_k


def test_flat_distributions_are_cut_in_the_middle():
    """The nucleus is half of a big vocabulary; ties at its edge are all in."""
    logits_C = torch.linspace(0, 1e-3, 5000)
    for options, least in [({"top_p": 0.5}, 2499), ({"top_p": 0.5, "top_k": 1000}, 4499), ({"top_k": 3}, 4997)]:
        tokens = drawn(logits_C, Sampling(seed=0, **options), 3000).nonzero()[:, 0]
        assert least <= tokens.min() <= least + 20 and tokens.max() > 4980
    assert (drawn(torch.zeros(6), Sampling(seed=0, top_p=0.1), 300) > 0).all()


def test_the_smallest_top_p_takes_the_top_token():
    """1e-46 is 0 in fp32."""
    logits_C = torch.tensor([0.0, 2.0, 1.0])
    for options in ({}, {"top_k": 2}):
        assert drawn(logits_C, Sampling(seed=0, top_p=1e-46, **options), 50).tolist() == [0, 50, 0]


def test_damaged_models_are_told_apart():
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sample(torch.tensor([[0.0, float("nan")]]), [Sampling(seed=0)], [0])


def test_half_precision_and_forbidden_tokens():
    logits_C = torch.tensor([0.0, float("-inf"), 1.0, -1e4])
    counts = drawn(logits_C.bfloat16(), Sampling(seed=1), 2000)
    assert counts[1] == 0 and counts[3] == 0 and counts[2] > counts[0] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"prompt_logprobs": 21},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": ("",)},
        {"stop": "text"},
        {"frequency_penalty": 2.5},
        {"presence_penalty": float("nan")},
        {"logprobs": 21},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-9},
        {"min_tokens": 17},
    ],
    ids=str,
)
def test_wrong_options_are_one_line(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}=.*: must") as error:
        Sampling(**wrong)
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 5, 64, 1000, 20000]), st.integers(1, 60), st.integers(0, 99))
def test_the_largest_are_found_by_blocks(rows, classes, k, seed):
    """Also among equals, of which the first counts."""
    x_NC = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)).round(decimals=1 + seed % 3)
    assert argmax(x_NC).tolist() == [row.index(max(row)) for row in x_NC.tolist()]
    k = min(k, classes)
    values_NK, places_NK = largest(x_NC, k)
    assert torch.equal(values_NK, x_NC.sort(-1, descending=True).values[:, :k])
    assert torch.equal(x_NC.gather(1, places_NK), values_NK)
    assert all(len(set(row)) == k for row in places_NK.tolist())
