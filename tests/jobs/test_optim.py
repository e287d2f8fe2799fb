"""The schedule at its corners, and what is decayed."""

import pytest
import torch
from torch import nn

from jobs.optim import Optim, adamw, groups


@pytest.mark.parametrize("schedule", ("cosine", "linear", "wsd", "constant"))
def test_a_schedule_warms_up_and_ends_at_its_floor(schedule):
    optim = Optim(lr=2.0, warmup=10, schedule=schedule, floor=0.25, cooldown=0.3)
    rates = [optim.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert max(rates) == 2.0 and rates[10] == pytest.approx(2.0)
    falling = rates[10:]
    assert falling == sorted(falling, reverse=True)
    assert rates[-1] == pytest.approx({"constant": 2.0}.get(schedule, 0.5))
    middle = {"cosine": 1.25, "linear": 1.25, "wsd": 2.0, "constant": 2.0}[schedule]
    assert (rates[54] + rates[55]) / 2 == pytest.approx(middle, rel=1e-3)
    assert (rates[69] == 2.0) == (schedule in ("wsd", "constant"))


def test_a_run_shorter_than_its_warmup_has_a_rate():
    assert [Optim(lr=1.0, warmup=5).rate(step, 2) for step in range(2)] == [0.2, 0.4]
    assert Optim(lr=1.0, warmup=0).rate(0, 1) == 1.0


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    decayed, others = groups(dict(model.named_parameters()), 0.1)
    assert {tuple(p.shape) for p in decayed["params"]} == {(5, 4), (3, 4)}
    assert {p.dim() for p in others["params"]} == {1} and others["weight_decay"] == 0
    optimizer = adamw(dict(model.named_parameters()), Optim(decay=0.1, beta1=0.5, beta2=0.6, eps=1e-3))
    assert optimizer.defaults["betas"] == (0.5, 0.6) and optimizer.defaults["eps"] == 1e-3
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.9 if parameter.dim() == 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)
