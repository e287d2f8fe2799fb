"""Recurrent parts against independent implementations, and the decode contract where they do not start at zero."""

import math
import random

import contract
import pytest
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import models
from models.ffn.channel_mix import ChannelMix
from models.mixers.lstm import LSTM
from models.mixers.mamba_ssd import MambaSSD
from models.mixers.rwkv7 import RWKV7
from models.span import Span
from models.stateful import Place


def close(ours, theirs, tolerance=2e-5, what="output"):
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1e-6)
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def at(rows, tokens):
    return Span(torch.arange(tokens).expand(rows, -1))


def same_gradients(outputs, leaves, what):
    """The same random output gradient through (ours, theirs); leaves are pairs (ours, theirs) by name."""
    weight = torch.randn_like(outputs[0])
    found = torch.autograd.grad((outputs[0] * weight).sum(), [ours for ours, _ in leaves.values()])
    wanted = torch.autograd.grad(
        (outputs[1] * weight.to(outputs[1].dtype)).sum(), [theirs for _, theirs in leaves.values()]
    )
    for name, one, two in zip(leaves, found, wanted, strict=True):
        close(one, two.reshape(one.shape), 1e-4, f"{what} gradient of {name}")


def test_mamba_ssd_is_mamba2(pick):
    groups, per_group = pick.choice([1, 2, 3]), pick.choice([1, 2])
    head_dim, state, conv, expand = pick.choice([8, 16]), pick.choice([4, 24]), pick.choice([2, 4]), pick.choice([1, 2])
    heads, tokens = groups * per_group * 2, pick.choice([1, 17, 70])
    dim = heads * head_dim // expand
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=dim,
            num_heads=heads,
            head_dim=head_dim,
            state_size=state,
            n_groups=groups,
            conv_kernel=conv,
            expand=expand,
            chunk_size=16,
            num_hidden_layers=1,
        ),
        0,
    )
    for parameter, low, high in (
        (theirs.dt_bias, -4, 1),
        (theirs.A_log, -1, 2),
        (theirs.D, -1, 1),
        (theirs.norm.weight, 0.5, 1.5),
    ):
        torch.nn.init.uniform_(parameter, low, high)
    options = pick.choice([{"heads": heads}, {"expand": expand}])
    ours = MambaSSD(
        MambaSSD.Config(head_dim=head_dim, state=state, groups=groups, conv=conv, **options), Place(dim, eps=1e-5)
    )
    names = {
        "wi.weight": theirs.in_proj.weight,
        "conv": theirs.conv1d.weight,
        "conv_bias": theirs.conv1d.bias,
        "log_decay": theirs.A_log,
        "step_bias": theirs.dt_bias,
        "skip": theirs.D,
        "norm.weight": theirs.norm.weight,
        "wo.weight": theirs.out_proj.weight,
    }
    parameters = dict(ours.named_parameters())
    ours.load_state_dict({name: weight.detach().reshape(parameters[name].shape) for name, weight in names.items()})
    x_BTD = torch.randn(2, tokens, dim)
    one, two = (x_BTD.clone().requires_grad_() for _ in range(2))
    outputs = ours(one, at(2, tokens))[0], theirs(two)
    close(*outputs)
    same_gradients(outputs, {"x": (one, two)} | {name: (parameters[name], names[name]) for name in names}, "mamba_ssd")


def rwkv7_by_hand(p, x_TD, heads, first_TD):
    """One row, token by token, in the row form of the paper; p: the parameters by name. Returns outputs and values."""
    size = x_TD.shape[1] // heads
    memory = [x_TD.new_zeros(size, size) for _ in range(heads)]
    before, outputs, values = torch.zeros_like(x_TD[0]), [], []
    for t, x in enumerate(x_TD):
        r_in, w_in, k_in, v_in, a_in, g_in = (x + (before - x) * mu for mu in p["mix"])
        before = x
        r, k, v = p["wr.weight"] @ r_in, p["wk.weight"] @ k_in, p["wv.weight"] @ v_in
        values.append(v)
        if first_TD is not None:
            v = v + (first_TD[t] - v) * torch.sigmoid(p["v0"] + p["up.v"] @ (p["down.v"] @ v_in))
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"] + p["up.w"] @ torch.tanh(p["down.w"] @ w_in)))
        a = torch.sigmoid(p["a0"] + p["up.a"] @ (p["down.a"] @ a_in))
        g = p["up.g"] @ torch.sigmoid(p["down.g"] @ g_in)
        kk, k = k * p["k_k"], k * (1 + (a - 1) * p["k_a"])
        mixed = []
        for h in range(heads):
            s = slice(h * size, (h + 1) * size)
            unit = kk[s] / kk[s].norm()
            memory[h] = memory[h] * w[s] - torch.outer(memory[h] @ unit, unit * a[s]) + torch.outer(v[s], k[s])
            y = memory[h] @ r[s]
            y = (y - y.mean()) / (y.var(unbiased=False) + 64e-5).sqrt() * p["norm_weight"][s] + p["norm_bias"][s]
            mixed.append(y + (r[s] * k[s] * p["r_k"][h]).sum() * v[s])
        outputs.append(p["wo.weight"] @ (torch.cat(mixed) * g))
    return torch.stack(outputs), torch.stack(values)


def test_rwkv7_is_the_paper(pick):
    """Two layers, so that the second leans on the first's values."""
    heads, size, rank, tokens = pick.choice([1, 2, 3]), pick.choice([4, 8]), pick.choice([2, 5]), pick.choice([3, 40])
    dim = heads * size
    layers = [RWKV7(RWKV7.Config(heads, rank), Place(dim, layer, 2)) for layer in range(2)]
    leaves, theirs = {}, []
    for layer, part in enumerate(layers):
        p = {}
        for name, parameter in part.named_parameters():
            # Values of order one all the way: a saturated tanh or a tiny norm would measure rounding instead.
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
            p[name] = parameter.detach().double().requires_grad_()
            leaves[f"{layer}.{name}"] = parameter, p[name]
        theirs.append(p)
    one = torch.randn(1, tokens, dim).requires_grad_()
    two = one.detach().double()[0].requires_grad_()
    span = at(1, tokens)
    ours = layers[1](one + layers[0](one, span)[0], span)[0]
    first, values = rwkv7_by_hand(theirs[0], two, heads, None)
    second, _ = rwkv7_by_hand(theirs[1], two + first, heads, values)
    close(ours[0], second)
    same_gradients((ours[0], second), leaves | {"x": (one, two)}, "rwkv7")


def test_rwkv7_starts_as_the_authors_do():
    parts = [RWKV7(RWKV7.Config(heads=2), Place(64, layer, 3)) for layer in range(3)]
    x_BTD, span = torch.randn(2, 9, 64), at(2, 9)
    for part in parts:
        assert not part(x_BTD, span)[0].any()  # W_o is zero
        assert {name: len(rank) for name, rank in part.down.items()} == (
            {"w": 32, "a": 32, "g": 32} if part.first else {"w": 32, "a": 32, "v": 32, "g": 32}
        )
        decay = torch.exp(-math.exp(-0.5) * part.w0.sigmoid())
        assert 0.545 < decay.min() < 0.7 and 0.99 < decay.max() < 1
    assert parts[1].first is False and parts[0].mix.shape == (6, 64)
    assert (parts[0].mix >= parts[2].mix).all() and (parts[0].mix[:, 0] == 1).all()


def test_rwkv7_keeps_its_draws_in_a_decoder():
    """The decoder draws linear weights anew, but not those that a part has set to zero."""
    decoder = models.build("decoder", pattern="rwkv7", ffn="channel_mix")
    for block in decoder.blocks:
        assert not block.mixer.wo.weight.any() and not block.ffn.wo.weight.any() and not block.mixer.down["w"].any()


def test_channel_mix_is_the_equation(pick):
    dim, hidden, tokens = pick.choice([5, 16]), pick.choice([7, 30]), pick.choice([1, 13])
    part = ChannelMix(ChannelMix.Config(hidden), Place(dim, 1, 3))
    torch.nn.init.normal_(part.wo.weight)
    x_BTD = torch.randn(2, tokens, dim)
    y_BTD, _ = part(x_BTD, at(2, tokens))
    for t in range(tokens):
        before = x_BTD[:, t - 1] if t else torch.zeros(2, dim)
        leaning = x_BTD[:, t] * (1 - part.mix) + before * part.mix
        close(y_BTD[:, t], (leaning @ part.wi.weight.T).clamp(min=0) ** 2 @ part.wo.weight.T)


@pytest.mark.parametrize("projected", [False, True])
def test_lstm_is_torch_lstm(pick, projected):
    dim, tokens = pick.choice([3, 8]), pick.choice([1, 33])
    hidden = dim + 2 if projected else dim
    theirs = torch.nn.LSTM(dim, hidden, batch_first=True)
    ours = LSTM(LSTM.Config(hidden), Place(dim))
    weights = {
        "wi.weight": theirs.weight_ih_l0,
        "recurrent": theirs.weight_hh_l0,
        "bias": theirs.bias_ih_l0 + theirs.bias_hh_l0,
    }
    wo = torch.randn(dim, hidden) if projected else torch.eye(dim)
    ours.load_state_dict(
        {name: weight.detach() for name, weight in weights.items()} | ({"wo.weight": wo} if projected else {})
    )
    one = torch.randn(2, tokens, dim).requires_grad_()
    two = one.detach().clone().requires_grad_()
    outputs = ours(one, at(2, tokens))[0], theirs(two)[0] @ wo.T
    close(*outputs)
    weights["bias"] = theirs.bias_ih_l0  # of a sum, the gradient of either
    leaves = {name: (parameter, weights[name]) for name, parameter in ours.named_parameters() if name in weights}
    same_gradients(outputs, {"x": (one, two)} | leaves, "lstm")


def test_state_does_not_grow():
    for name in ("mamba_ssd", "rwkv7", "lstm"):
        part = models.build(name).blocks[0].mixer
        assert part.state_spec(10) == part.state_spec(10_000) and not any(s.every for s in part.state_spec(10).values())


# The suites over the registry see these parts as they start, where a zero W_o hides what is behind it.
def awake(pattern):
    torch.manual_seed(0)
    decoder = models.build("decoder", pattern=pattern, ffn="channel_mix", layers=len(pattern.split()) + 1).eval()
    for parameter in decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
    return decoder


@pytest.mark.parametrize("check", contract.ON_ANY_MEMORY + contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("pattern", ["rwkv7", "rwkv7 gqa"])
def test_contract_with_every_weight_awake(pattern, check):
    with torch.set_grad_enabled(check not in contract.ON_ANY_MEMORY):
        check(awake(pattern), random.randrange(1 << 30))
