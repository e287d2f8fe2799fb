"""The memories of rwkv7 and kda against fla's plain loops: outputs, final states and gradients at drawn sizes.

Theirs is fp32 throughout, and so is what is compared with it here.
"""

import torch
from contract import same
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.kda.naive import naive_recurrent_kda
from torch.nn.functional import normalize

import kernels


def both(ours, theirs, leaves, state):
    """The same outputs, final states and gradients of a random weighting."""
    found, expected = ours(*leaves, state), theirs(*leaves, state)
    weights = [torch.randn_like(x) for x in expected]
    gradients = []
    for values in (found, expected):
        loss = sum((value * weight).sum() for value, weight in zip(values, weights))
        gradients.append(torch.autograd.grad(loss, [*leaves, state]))
    for mine, other in zip([*found, *gradients[0]], [*expected, *gradients[1]]):
        same(mine, other, 2e-5)


def leaf(*values):
    return [value.detach().requires_grad_() for value in values]


def test_the_memory_of_rwkv7_is_dplr(pick):
    rows, tokens, heads = pick.choice([1, 3]), pick.choice([1, 17, 70]), pick.choice([1, 3])
    size, values = pick.choice([4, 16]), pick.choice([8, 16])
    q, k, decay, step = (torch.randn(rows, tokens, heads, size) for _ in range(4))
    v, state = torch.randn(rows, tokens, heads, values), torch.randn(rows, heads, size, values)
    k, step = normalize(k, dim=-1), step.sigmoid()
    *leaves, state = leaf(q, k, v, -0.6 * decay.sigmoid(), -k, k * step, state)

    def ours(q, k, v, decay, a, b, state):
        return kernels.generalized_delta(q, k, v, decay, a, b, scale=size**-0.5, state_BHKV=state)

    def theirs(q, k, v, decay, a, b, state):
        q, k, v, a, b, decay = (x.transpose(1, 2) for x in (q, k, v, a, b, decay))
        y, after = dplr_recurrence(q, k, v, a, b, decay, state)
        return y.transpose(1, 2), after

    both(ours, theirs, leaves, state)


def test_the_memory_of_kda_is_theirs(pick):
    rows, tokens, heads = pick.choice([1, 3]), pick.choice([1, 17, 70]), pick.choice([1, 3])
    size, values = pick.choice([4, 16]), pick.choice([8, 16])
    q, k, decay = (torch.randn(rows, tokens, heads, size) for _ in range(3))
    v, beta = torch.randn(rows, tokens, heads, values), torch.rand(rows, tokens, heads)
    state = torch.randn(rows, heads, size, values)
    *leaves, state = leaf(normalize(q, dim=-1), normalize(k, dim=-1), v, -decay.exp(), beta, state)

    def ours(q, k, v, decay, beta, state):
        return kernels.gated_delta(q, k, v, decay, beta, state_BHKV=state)

    def theirs(q, k, v, decay, beta, state):
        return naive_recurrent_kda(q, k, v, decay, beta, initial_state=state, output_final_state=True)

    both(ours, theirs, leaves, state)
