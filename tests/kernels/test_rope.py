"""rope: each form against the definition, complex numbers as the independent truth, and what makes it rotary."""

import pytest
import torch

from kernels import rope, rope_angles
from tests.kernels.physics import DEVICE, chain, close
from tests.kernels.suite import Differentiable, wrong


def case(rows, tokens, heads, size, pairs, given=None, interleaved=False):
    def draw():
        angle = torch.randn(given or rows, tokens, pairs)
        x = {"x_BTHK": torch.randn(rows, tokens, heads, size), "cos_BTR": 1.3 * angle.cos(), "sin_BTR": angle.sin()}
        return lambda **x: rope(**x, interleaved=interleaved), x

    return draw


class TestRope(Differentiable):
    CASES = {
        "whole": case(2, 63, 3, 60, 30),
        "partial": case(2, 63, 3, 60, 10, 1),
        "interleaved": case(2, 63, 3, 60, 30, 1, interleaved=True),
        "interleaved-partial": case(2, 5, 1, 61, 12, interleaved=True),
        "one-token": case(3, 1, 4, 64, 32),
        "none-turn": case(1, 3, 2, 8, 0),
        "no-tokens": case(2, 0, 3, 60, 30),
        "no-rows": case(0, 3, 3, 60, 30, 1),
    }
    SMALL = {"halves": case(2, 2, 2, 5, 2, 1), "interleaved": case(1, 2, 1, 4, 2, interleaved=True)}


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_a_product_of_complex_numbers(interleaved):
    x, angle = torch.randn(2, 7, 3, 20, device=DEVICE), torch.randn(2, 7, 8, device=DEVICE)
    y = rope(x, angle.cos(), angle.sin(), interleaved=interleaved)
    pairs = (lambda v: v.unflatten(-1, (8, 2))) if interleaved else (lambda v: v.unflatten(-1, (2, 8)).mT)
    turned = torch.view_as_complex(pairs(x[..., :16]).contiguous()) * torch.polar(angle.new_ones(()), angle)[:, :, None]
    close(torch.view_as_complex(pairs(y[..., :16]).contiguous()), turned)
    assert torch.equal(y[..., 16:], x[..., 16:])


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, device=DEVICE)
    frequency = torch.rand(8, dtype=torch.float64, device=DEVICE)

    def score(t, j):
        at = [rope_angles(torch.tensor([[p]], device=DEVICE), frequency) for p in (t, j)]
        return (rope(q, at[0].cos(), at[0].sin()) * rope(k, at[1].cos(), at[1].sin())).sum()

    close(score(107, 103), score(7, 3), 1e-10)
    assert (score(107, 103) - score(107, 104)).abs() > 1e-6


def test_a_part_of_a_packed_projection(form):
    packed = torch.randn(2, 5, 3, 3, 16)
    angle = torch.randn(2, 5, 8)
    chain(rope, {"x_BTHK": packed[:, :, 1], "cos_BTR": angle.cos(), "sin_BTR": angle.sin()}, form)
    chain(rope, {"x_BTHK": packed[:, :, 1].mT.contiguous().mT, "cos_BTR": angle.cos(), "sin_BTR": angle.sin()}, form)


def test_angles_of_several_axes():
    positions, frequency = torch.randint(0, 90, (2, 5, 3)), torch.rand(64)
    runs = rope_angles(positions, frequency, sections=(16, 24, 24))
    close(runs[..., 16:40], positions[..., 1:2] * frequency[16:40])
    turns = rope_angles(positions, frequency, sections=(24, 20, 20), interleaved=True)
    close(turns[..., 1:60:3], positions[..., 1:2] * frequency[1:60:3])
    close(turns[..., 2:60:3], positions[..., 2:3] * frequency[2:60:3])
    rest = [*range(0, 60, 3), 60, 61, 62, 63]
    close(turns[..., rest], positions[..., 0:1] * frequency[rest])
    same = positions[..., :1].expand(-1, -1, 3)
    for interleaved in (False, True):
        one = rope_angles(same, frequency, sections=(24, 20, 20), interleaved=interleaved)
        assert torch.equal(one, rope_angles(same[..., 0], frequency))


def test_mistakes_name_the_argument():
    x = {"x_BTHK": torch.randn(2, 3, 1, 8), "cos_BTR": torch.randn(2, 3, 4), "sin_BTR": torch.randn(1, 3, 4)}
    wrong(rope, x, ValueError, "x_BTHK", x_BTHK=torch.randn(2, 3, 8))
    wrong(rope, x, ValueError, "cos_BTR must be", cos_BTR=torch.randn(2, 2, 4))
    wrong(rope, x, ValueError, "cos_BTR must have B=2", cos_BTR=torch.randn(3, 3, 4))
    wrong(rope, x, ValueError, "cos_BTR has 5 pairs", cos_BTR=torch.randn(1, 3, 5))
    wrong(rope, x, ValueError, "sin_BTR has 3", sin_BTR=torch.randn(1, 3, 3))
    wrong(rope, x, TypeError, "sin_BTR", sin_BTR=torch.ones(1, 3, 4).long())
    wrong(rope, x, ValueError, "sin_BTR must be on", sin_BTR=torch.randn(1, 3, 4, device="meta"))
    angles = {"positions": torch.zeros(1, 2, 3), "frequency_R": torch.rand(6)}
    wrong(rope_angles, angles, ValueError, "sections")
    wrong(rope_angles, angles, ValueError, "sections", sections=(2, 2, 3))
    wrong(rope_angles, angles, ValueError, "interleave", sections=(1, 1, 4), interleaved=True)
    wrong(rope_angles, angles, ValueError, "sections", sections=(6,), positions=torch.zeros(1, 2))
