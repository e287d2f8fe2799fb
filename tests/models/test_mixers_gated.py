"""Gated recurrences and gated attention: parity with independent implementations, and what makes each what it is."""

import copy
import inspect
import math
from functools import partial

import contract
import pytest
import torch
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
from transformers import (
    DiffLlamaConfig,
    DynamicCache,
    KimiLinearConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaModel,
    RwkvConfig,
    RwkvModel,
)
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaAttention

import models
from models.decoder import Decoder
from models.ffn.channel_mix import ChannelMix
from models.layers.ema import EMA
from models.layers.timestep_norm import TimestepNorm
from models.mixers.diff_transformer import DiffTransformer
from models.mixers.gated_attention import GatedAttention
from models.mixers.gqa import GQA
from models.mixers.griffin import Griffin
from models.mixers.hawk import Hawk
from models.mixers.kda import KDA
from models.mixers.mega import Mega
from models.mixers.megalodon import Megalodon
from models.mixers.rwkv import RWKV
from models.mixers.rwkv6 import RWKV6
from models.span import Span
from models.stateful import Place


def at(rows, tokens, start=0):
    positions_BT = torch.arange(start, start + tokens).expand(rows, -1)
    return Span(positions_BT, length_B=positions_BT[:, 0] if start else None)


def off(found, exact):
    return ((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-6)).item()


def close(found, exact, tolerance=1e-5, what="output"):
    assert off(found, exact) < tolerance, f"{what}: relative error {off(found, exact):.2e}"


def same_function(ours, theirs, convert, x_BTD, run_ours=None, run_theirs=None, weights=None):
    """Outputs and the gradients of x and of every weight; `convert` maps their tensors by name to ours, linearly, so
    that it maps gradients too; `weights` maps the values where that takes a constant as well.

    Both are fp32, so our part in float64 is the judge: theirs must agree with it, and ours may be off by 1e-5, or by
    twice what theirs is.
    """
    run_ours = run_ours or (lambda part, x: part(x, at(*x.shape[:2]))[0])
    mapped = (weights or convert)({name: tensor.detach() for name, tensor in theirs.named_parameters()})
    ours.load_state_dict({name: tensor.clone() for name, tensor in mapped.items()})
    weight = None

    def values(part, run, x, mapped=lambda grads: grads):
        nonlocal weight
        x = x.clone().requires_grad_()
        part.zero_grad()
        y = run(part, x)
        weight = torch.randn_like(y) if weight is None else weight
        (y * weight.to(y.dtype)).sum().backward()
        grads = mapped({name: p.grad for name, p in part.named_parameters()})
        return {"output": y, "gradient of x": x.grad} | {f"gradient of {name}": g for name, g in grads.items()}

    wanted = values(theirs, run_theirs or (lambda part, x: part(x)), x_BTD, convert)
    found = values(ours, run_ours, x_BTD)
    exact = values(copy.deepcopy(ours).double(), run_ours, x_BTD.double())
    assert wanted.keys() == found.keys()
    for name, truth in exact.items():
        close(wanted[name].reshape(truth.shape), truth, 1e-2, f"their {name}")
        least = 1e-5 if name == "output" else 1e-4  # gradients are sums over tokens that may all but cancel
        close(found[name], truth, max(least, 2 * off(wanted[name].reshape(truth.shape), truth)), f"our {name}")


def same_as_by_hand(ours, x_1TD, function):
    """`same_function` with function(parameters by name, x_TD), and the part's own steps against its whole."""
    theirs = torch.nn.Module()
    names = {name.replace(".", "_"): name for name, _ in ours.named_parameters()}
    for name, original in names.items():
        theirs.register_parameter(name, torch.nn.Parameter(ours.get_parameter(original).detach().clone()))

    def run(part, x_1TD):
        return function({names[name]: value for name, value in part.named_parameters()}, x_1TD[0])[None]

    def convert(tensors):
        return {names[name]: value for name, value in tensors.items()}

    same_function(ours, theirs, convert, x_1TD, run_theirs=run)
    with torch.no_grad():
        close(stepped(ours, x_1TD), ours(x_1TD, at(*x_1TD.shape[:2]))[0], 1e-4)


def stepped(part, x_BTD, cuts=None):
    """Outputs of a part that carries its state over calls of one token, or of those that `cuts` make."""
    rows, tokens = x_BTD.shape[:2]
    state = {name: spec.empty(rows, tokens) for name, spec in part.state_spec(tokens).items()}
    outputs = []
    for start, end in zip([0, *(cuts or range(1, tokens))], [*(cuts or range(1, tokens)), tokens]):
        span = Span(torch.arange(start, end).expand(rows, -1), length_B=torch.full((rows,), start))
        y_BTD, state = part(x_BTD[:, start:end], span, state)
        outputs.append(y_BTD)
    return torch.cat(outputs, 1)


def shake(part, scale=0.5):
    """Every parameter redrawn, so that nothing hides behind a zero."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(std=scale * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1))
    return part


@pytest.fixture
def plain_kimi(monkeypatch):
    """Their own torch code: with fla installed they would call its kernels, which need a GPU."""
    for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
        monkeypatch.setattr(modeling_kimi_linear, name, inspect.unwrap(getattr(modeling_kimi_linear, name)))


def kimi(pick, layer=0):
    heads, size, conv, dim = pick.choice([1, 3]), pick.choice([4, 16]), pick.choice([2, 4]), pick.choice([24, 40])
    config = KimiLinearConfig(
        hidden_size=dim,
        linear_num_heads=heads,
        linear_head_dim=size,
        linear_conv_kernel_dim=conv,
        num_hidden_layers=4,
        rms_norm_eps=1e-5,
    )
    theirs = modeling_kimi_linear.KimiLinearDeltaAttention(config, layer)
    torch.nn.init.uniform_(theirs.forget_gate.A_log, -1, 2)
    torch.nn.init.uniform_(theirs.forget_gate.dt_bias, -4, 1)
    torch.nn.init.uniform_(theirs.o_norm.weight, 0.5, 1.5)
    return theirs, KDA(KDA.Config(heads, size, conv), Place(dim, eps=1e-5)), config


def from_kimi(theirs):
    inputs = ("q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "g_a_proj", "b_proj")
    return {
        "wi.weight": torch.cat([theirs[f"{name}.weight"] for name in inputs]),
        "conv": theirs["conv1d.weight"][:, 0],
        "wf.weight": theirs["forget_gate.f_b_proj.weight"],
        "wz.weight": theirs["g_b_proj.weight"],
        "log_decay": theirs["forget_gate.A_log"].flatten(),
        "step_bias": theirs["forget_gate.dt_bias"],
        "norm.weight": theirs["o_norm.weight"],
        "wo.weight": theirs["o_proj.weight"],
    }


def test_kda_is_kimi_linear(pick, plain_kimi):
    theirs, ours, config = kimi(pick)
    x_BTD = torch.randn(2, pick.choice([1, 17, 70]), config.hidden_size)
    same_function(ours, theirs, from_kimi, x_BTD)


@torch.no_grad()
def test_kda_decodes_as_kimi_linear(pick, plain_kimi):
    """Their cache over a prompt, two tokens at once and single ones; ours over the same calls."""
    theirs, ours, config = kimi(pick)
    ours.load_state_dict(from_kimi(dict(theirs.named_parameters())))
    x_BTD, cache = torch.randn(2, 12, config.hidden_size), DynamicCache(config=config)
    cuts = [7, 9, 10, 11]
    calls = zip([0, *cuts], [*cuts, 12])
    expected = torch.cat([theirs(x_BTD[:, start:end], cache_params=cache) for start, end in calls], 1)
    close(stepped(ours, x_BTD, cuts), expected)


def test_kda_channels_have_their_own_clock(pick):
    """A channel of keys with no decay keeps what it holds, one that decays forgets; a decay by head could not."""
    part = shake(KDA(KDA.Config(1, 4, 2), Place(8)))
    with torch.no_grad():
        part.log_decay.zero_()
        part.wf.weight.zero_()
        part.step_bias.copy_(torch.tensor([-30.0, 30.0, -30.0, 30.0]))
        state = {name: spec.empty(1, 9) for name, spec in part.state_spec(9).items()}
        state["matrix"].fill_(1.0)
        part.wi.weight[-1].fill_(-1e3)  # beta of 0: nothing is written
        _, after = part(torch.rand(1, 5, 8), at(1, 5), state)
    close(after["matrix"][0, 0], torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None].expand(4, 4))


def rwkv(pick, layers=3):
    dim, hidden, inner = pick.choice([16, 40]), pick.choice([None, 24]), pick.choice([None, 30])
    config = RwkvConfig(
        vocab_size=9, hidden_size=dim, num_hidden_layers=layers, attention_hidden_size=hidden, intermediate_size=inner
    )
    model = RwkvModel(config)
    for parameter in model.parameters():
        if parameter.dim() == 3 or parameter.dim() == 1:  # mixes, decay, bonus
            torch.nn.init.normal_(parameter, std=0.7)
    return model, config


def from_rwkv(theirs):
    return {
        "mix": torch.cat([theirs[f"time_mix_{name}"][0] for name in ("key", "value", "receptance")]),
        "log_decay": theirs["time_decay"],
        "bonus": theirs["time_first"],
        **{f"w{name[0]}.weight": theirs[f"{name}.weight"] for name in ("key", "value", "receptance")},
        "wo.weight": theirs["output.weight"],
    }


def test_rwkv_is_rwkv4(pick):
    model, config = rwkv(pick)
    ours = RWKV(RWKV.Config(config.attention_hidden_size or 0), Place(config.hidden_size))
    x_BTD = torch.randn(2, pick.choice([3, 40]), config.hidden_size) * 3
    theirs = model.blocks[1].attention
    same_function(ours, theirs, from_rwkv, x_BTD, run_theirs=lambda part, x: part(x)[0])
    with torch.no_grad():
        close(stepped(ours, x_BTD), theirs(x_BTD)[0])


def test_channel_mix_with_receptance_is_rwkv4(pick):
    model, config = rwkv(pick)
    ours = ChannelMix(ChannelMix.Config(config.intermediate_size or 0, receptance=True), Place(config.hidden_size))

    def convert(theirs, one=0.0):  # they mix the other way round
        return {
            "mix": one - theirs["time_mix_key"][0, 0],
            "mix_r": one - theirs["time_mix_receptance"][0, 0],
            "wi.weight": theirs["key.weight"],
            "wr.weight": theirs["receptance.weight"],
            "wo.weight": theirs["value.weight"],
        }

    x_BTD = torch.randn(2, pick.choice([1, 21]), config.hidden_size)
    theirs = model.blocks[1].feed_forward
    same_function(ours, theirs, convert, x_BTD, run_theirs=lambda part, x: part(x)[0], weights=partial(convert, one=1))


def test_rwkv_starts_as_rwkv4():
    model = RwkvModel(RwkvConfig(vocab_size=9, hidden_size=24, num_hidden_layers=3))
    for layer, block in enumerate(model.blocks):
        ours, theirs = RWKV(RWKV.Config(), Place(24, layer, 3)), from_rwkv(dict(block.attention.named_parameters()))
        close(ours.mix, theirs["mix"])
        close(ours.log_decay, theirs["log_decay"])
        # The authors' log(0.3) +- 0.5; transformers' port has ones there.
        assert ours.bonus.mean().item() == pytest.approx(math.log(0.3), abs=1e-5) and ours.bonus.unique().numel() == 3


def test_rwkv_reads_what_would_overflow(pick):
    """Keys of +-300: e^k is neither a number nor above zero, the average of values still is."""
    part = shake(RWKV(RWKV.Config(), Place(8)))
    with torch.no_grad():
        part.wk.weight.copy_(torch.eye(8) * 300)
    y_BTD, _ = part(torch.randn(2, 30, 8), at(2, 30))
    assert y_BTD.isfinite().all() and (y_BTD[:, 5:].abs().amax((0, 1)) > 0).all()


def recurrent_gemma(pick):
    heads, size = pick.choice([1, 2, 4]), pick.choice([8, 16])
    dim = heads * size
    config = RecurrentGemmaConfig(
        num_hidden_layers=3,
        vocab_size=9,
        hidden_size=dim,
        lru_width=pick.choice([dim, 2 * dim]),
        intermediate_size=12,
        num_attention_heads=heads,
        num_key_value_heads=pick.choice([1, heads]),
        head_dim=size,
        conv1d_width=pick.choice([2, 4]),
        attention_window_size=pick.choice([3, 11]),
        attn_implementation="eager",
    )
    model = RecurrentGemmaModel(config)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return [layer.temporal_block for layer in model.layers], config


def from_recurrent_gemma(theirs):
    if "q_proj.weight" in theirs:
        return {
            "wqkv.weight": torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"]),
            "wo.weight": theirs["o_proj.weight"],
            "wo.bias": theirs["o_proj.bias"],
        }
    pair = ("input_gate", "recurrent_gate")
    return {
        "wi.weight": torch.cat([theirs["linear_y.weight"], theirs["linear_x.weight"]]),
        "wi.bias": torch.cat([theirs["linear_y.bias"], theirs["linear_x.bias"]]),
        "conv": theirs["conv_1d.weight"][:, 0],
        "conv_bias": theirs["conv_1d.bias"],
        "gates": torch.stack([theirs[f"rg_lru.{name}_weight"] for name in pair]),
        "gate_bias": torch.stack([theirs[f"rg_lru.{name}_bias"] for name in pair]),
        "decay": theirs["rg_lru.recurrent_param"],
        "wo.weight": theirs["linear_out.weight"],
        "wo.bias": theirs["linear_out.bias"],
    }


def run_recurrent_gemma(part, x_BTD):
    positions_BT = torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[0], -1)
    if isinstance(part, RecurrentGemmaAttention):
        distance = positions_BT[0, :, None] - positions_BT[0]
        seen = (distance >= 0) & (distance < part.sliding_window)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        return part(x_BTD, positions_BT, mask)[0]
    return part(x_BTD, positions_BT, None, use_cache=False)[0]


def test_hawk_is_recurrent_gemma(pick):
    (theirs, *_), config = recurrent_gemma(pick)
    options = Hawk.Config(config.lru_width, config.num_attention_heads, config.conv1d_width)
    x_BTD = torch.randn(2, pick.choice([1, 40]), config.hidden_size)
    ours = Hawk(options, Place(config.hidden_size))
    same_function(ours, theirs, from_recurrent_gemma, x_BTD, run_theirs=run_recurrent_gemma)
    with torch.no_grad():
        close(stepped(ours, x_BTD), run_recurrent_gemma(theirs, x_BTD))


def test_hawk_keeps_its_size_whatever_it_forgets(pick):
    """Inputs of variance one leave states of variance one, in slow and fast channels: what sqrt(1 - a^2) is for."""
    part = Hawk(Hawk.Config(conv=2), Place(64))
    with torch.no_grad():
        part.wi.weight.copy_(torch.cat([torch.zeros(64, 64), torch.eye(64)]))
        part.wi.bias[:64] = 100.0  # gelu(100) = 100
        part.wo.weight.copy_(torch.eye(64) / 100)
        part.conv.copy_(torch.tensor([0.0, 1.0]).expand(64, 2))
        part.gates.zero_()
        part.gate_bias.copy_(torch.tensor([30.0, 0.0])[:, None, None].expand(2, *part.gate_bias.shape[1:]))
        part.decay.copy_(torch.linspace(-6, 2, 64))
        h_BTD, _ = part(torch.randn(4, 2000, 64), at(4, 2000))
    assert ((h_BTD[:, 500:].std((0, 1)) - 1).abs() < 0.35).all()
    assert ((h_BTD[:, 0].std() - 1).abs() < 0.3).all()  # also the first token, which nothing came before


def test_hawk_gradient_at_a_gate_that_never_forgets():
    """a of 1 within rounding: 1 - a^2 is 0, where the root's own gradient is infinite."""
    part = Hawk(Hawk.Config(), Place(16))
    with torch.no_grad():
        part.decay.fill_(-200.0)
    x_BTD = torch.randn(1, 9, 16).requires_grad_()
    part(x_BTD, at(1, 9))[0].sum().backward()
    assert all(value.grad.isfinite().all() for value in (x_BTD, *part.parameters()))


def test_griffin_is_recurrent_gemma(pick):
    """Each of three layers, of which the last attends to its window."""
    theirs, config = recurrent_gemma(pick)
    options = Griffin.Config(
        width=config.lru_width,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        conv=config.conv1d_width,
        window=config.attention_window_size,
    )
    x_BTD = torch.randn(2, 30, config.hidden_size)
    for layer, part in enumerate(theirs):
        ours = Griffin(options, Place(config.hidden_size, layer, 3))
        same_function(ours.inner, part, from_recurrent_gemma, x_BTD, run_theirs=run_recurrent_gemma)
        assert any(spec.every for spec in ours.state_spec(9).values()) == (layer == 2)


def test_griffin_sees_far_only_through_its_recurrence():
    """Alone, the attention of the third layer forgets what left its window; the recurrence before it does not."""
    torch.manual_seed(0)
    parts = [shake(Griffin(Griffin.Config(window=4), Place(16, layer, 3))) for layer in range(3)]
    x_BTD = torch.randn(1, 20, 16)
    other_BTD = torch.cat([x_BTD[:, :1] + 1, x_BTD[:, 1:]], 1)
    for layer, part in enumerate(parts):
        changed = (part(x_BTD, at(1, 20))[0] - part(other_BTD, at(1, 20))[0]).abs().amax(-1)[0]
        assert (changed[4:] > 0).any() == (layer < 2) and (changed[:4] > 0).all()


def rwkv6_by_hand(p, x_TD, heads, eagle):
    """One row, token by token, after the paper; the memory is fla's definition of it. p: the parameters by name."""
    before_TD = torch.cat([torch.zeros_like(x_TD[:1]), x_TD[:-1]])
    mixed = {}
    for i, name in enumerate("kvrg" if eagle else "kvrgw"):
        mix = p["mix"][i]
        if not eagle:
            leaning_TD = x_TD + (before_TD - x_TD) * p["mix_x"]
            mix = mix + torch.tanh(leaning_TD @ p["mix_down"][i].T) @ p["mix_up"][i]
        mixed[name] = (1 - mix) * x_TD + mix * before_TD
    r, k, v, g = (mixed[name] @ p[f"w{name}.weight"].T for name in "rkvg")
    decay = p["log_decay"].expand_as(x_TD)
    if not eagle:
        decay = decay + torch.tanh(mixed["w"] @ p["decay_down"].T) @ p["decay_up"]
    by_head = [x.unflatten(-1, (heads, -1)).transpose(0, 1)[None] for x in (r, k, v, -decay.exp())]
    y, _ = naive_recurrent_rwkv6(*by_head, p["bonus"].view(heads, -1), scale=1.0)
    y_TD = torch.nn.functional.group_norm(
        y[0].transpose(0, 1).flatten(1), heads, p["norm_weight"], p["norm_bias"], eps=64e-5
    )
    return (y_TD * torch.nn.functional.silu(g)) @ p["wo.weight"].T


@pytest.mark.parametrize("eagle", [False, True])
def test_rwkv6_is_the_paper(pick, eagle):
    heads, size, rank, tokens = pick.choice([1, 3]), pick.choice([4, 8]), pick.choice([2, 5]), pick.choice([3, 40])
    ours = shake(RWKV6(RWKV6.Config(heads, rank, eagle), Place(heads * size, 1, 3)))
    x_1TD = torch.randn(1, tokens, heads * size)
    same_as_by_hand(ours, x_1TD, lambda p, x_TD: rwkv6_by_hand(p, x_TD, heads, eagle))


def test_rwkv6_reads_a_token_before_it_is_written(pick):
    """Without a bonus the first output knows nothing; the bonus is of the token itself, and it alone."""
    part = shake(RWKV6(RWKV6.Config(2, 4), Place(8)))
    x_BTD = torch.randn(1, 4, 8)
    with torch.no_grad():
        part.norm_bias.zero_()
        part.bonus.zero_()
        y_BTD, _ = part(x_BTD, at(1, 4))
        assert not y_BTD[:, 0].any() and y_BTD[:, 1:].any(-1).all()
        part.bonus.fill_(1.0)
        assert part(x_BTD, at(1, 4))[0][:, 0].any()


def test_rwkv6_decay_depends_on_the_token_and_eagle_does_not(pick):
    """What is left of a memory after one token, for two tokens that differ."""
    zeros, ones = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    for eagle in (False, True):
        part = shake(RWKV6(RWKV6.Config(2, 4, eagle), Place(8)), 1.0)
        left = []
        for token in torch.randn(2, 1, 1, 8):
            state = {name: spec.empty(1, 9) for name, spec in part.state_spec(9).items()}
            with torch.no_grad():
                after = [
                    part(token.expand(1, 2, 8), at(1, 2), {**state, "matrix": m})[1]["matrix"] for m in (zeros, ones)
                ]
            left.append(after[1] - after[0])
        assert torch.allclose(*left, atol=1e-6) == eagle


def ema_by_hand(p, x_TD):
    """As the convolution it is, one lag after the other; p: the parameters of an EMA."""
    a, size = p["alpha"].sigmoid(), p["alpha"].shape[1]
    q, gain = 1 - a * p["delta"].sigmoid(), p["gain"][0]
    if "theta" in p:
        turns = torch.arange(1, size + 1) * p["theta"].sigmoid()[:, None] / size
        q, gain = q * torch.exp(2j * math.pi * turns), torch.complex(*p["gain"])
    y_TD = p["skip"] * x_TD
    for lag in range(len(x_TD)):
        kernel_D = (gain * a * q**lag).sum(1).real / size**0.5
        y_TD = y_TD + torch.cat([torch.zeros(lag, x_TD.shape[1]), kernel_D * x_TD[: len(x_TD) - lag]])
    return y_TD


def timestep_norm_by_hand(p, x_TD, eps):
    """Each token by the pooled statistics of the tokens so far and of the prior, which weighs as much as one."""
    groups, outputs = len(p["prior_mean"]), []
    for t in range(len(x_TD)):
        seen = x_TD[: t + 1].unflatten(1, (groups, -1))
        mean = (p["prior_mean"] + seen.mean(2).sum(0)) / (t + 2)
        prior = p["prior_log_var"].exp() + (p["prior_mean"] - mean) ** 2
        var = (prior + ((seen - mean[:, None]) ** 2).mean(2).sum(0)) / (t + 2)
        outputs.append(((seen[t] - mean[:, None]) / (var[:, None] + eps).sqrt()).flatten())
    return torch.stack(outputs) * p["weight"] + p["bias"]


def attend_by_hand(q_TK, k_TK, v_TV, chunk, scale):
    """One head with rotary positions; with `chunk` each token reads its own run of so many alone."""
    tokens, half = len(q_TK), q_TK.shape[1] // 2
    angle = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(half) / half)

    def turned(x):
        one, two = x[:, :half], x[:, half:]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], 1)

    place = torch.arange(tokens)
    hidden = place > place[:, None]
    if chunk:
        hidden |= place // chunk != place[:, None] // chunk
    scores = (turned(q_TK) @ turned(k_TK).T * scale).masked_fill(hidden, -math.inf)
    return scores.softmax(1) @ v_TV


def under(p, prefix):
    return {name[len(prefix) + 1 :]: value for name, value in p.items() if name.startswith(prefix + ".")}


@pytest.mark.parametrize("chunk", [0, 5])
def test_mega_is_the_paper(pick, chunk):
    dim, shared, values = pick.choice([6, 12]), pick.choice([2, 8]), pick.choice([5, 16])
    ours = shake(Mega(Mega.Config(shared, values, pick.choice([1, 4]), chunk), Place(dim)))

    def by_hand(p, x):
        silu = torch.nn.functional.silu
        averaged = silu(ema_by_hand(under(p, "ema"), x))
        u, h, z, r = (averaged @ p["wi.weight"].T + p["wi.bias"]).split([dim, dim, shared, values], 1)
        q, k = (silu(z) * p["kappa"][i] + p["mu"][i] for i in range(2))
        o = attend_by_hand(q, k, silu(x @ p["wv.weight"].T + p["wv.bias"]), chunk, shared**-0.5)
        return torch.sigmoid(u) * (silu(h + (silu(r) * o) @ p["wh.weight"].T) - x)

    same_as_by_hand(ours, torch.randn(1, pick.choice([3, 23]), dim), by_hand)


def test_megalodon_is_the_paper(pick):
    heads, size, groups, chunk = pick.choice([1, 2]), pick.choice([2, 4]), pick.choice([1, 3]), pick.choice([1, 4])
    dim, shared, values = 12, heads * size, heads * 5
    config = Megalodon.Config(heads, shared, values, pick.choice([1, 4]), groups, chunk)
    ours = shake(Megalodon(config, Place(dim, eps=1e-5)))

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def by_hand(p, x):
        silu = torch.nn.functional.silu
        n = timestep_norm_by_hand(under(p, "norm"), x, 1e-5)
        m = rms(ema_by_hand(under(p, "ema"), n)) * p["ema_norm.weight"]
        z, r = (m @ p["wi.weight"].T).split([shared, values], 1)
        z, v = rms(z.unflatten(1, (heads, size))).flatten(1), silu(n @ p["wv.weight"].T)
        q, k = (z * (p["gamma"][i] + 1) / size**0.5 + p["beta"][i] for i in range(2))
        by_head = zip(q.split(size, 1), k.split(size, 1), v.split(5, 1))
        o = torch.cat([attend_by_hand(*head, chunk, 1.0) for head in by_head], 1)
        return torch.cat([m, o * silu(r)], 1) @ p["wo.weight"].T

    same_as_by_hand(ours, torch.randn(1, pick.choice([3, 17]), dim), by_hand)


def test_averages_that_do_not_turn_are_those_of_mega(pick):
    real, turning = (shake(EMA(6, 4, turning)) for turning in (False, True))
    with torch.no_grad():
        for name, value in real.named_parameters():
            turning.get_parameter(name).copy_(value)  # the real gain serves both halves
        turning.theta.fill_(-50.0)
    x_BTD = torch.randn(2, 19, 6)
    close(turning(x_BTD, at(2, 19), None)[0], real(x_BTD, at(2, 19), None)[0])
    with torch.no_grad():
        turning.theta.fill_(0.0)
    assert off(turning(x_BTD, at(2, 19), None)[0], real(x_BTD, at(2, 19), None)[0]) > 1e-2


def test_averages_fade(pick):
    """|q| < 1 whatever the parameters, and it is the damping alone that says how fast."""
    ema = shake(EMA(16, 4, turning=True), 3.0)
    weight, keep = ema.weights()
    assert (keep.abs() < 1).all() and torch.allclose(keep.abs(), 1 - weight * ema.delta.sigmoid(), atol=1e-6)


@pytest.mark.parametrize("chunk", [4, 7])
def test_chunks_are_joined_by_averages_alone(pick, chunk):
    """Once the averages are of no weight, no output reads a token of a chunk before its own."""
    part = shake(Mega(Mega.Config(chunk=chunk), Place(16)))
    x_BTD = torch.randn(1, 3 * chunk + 2, 16)
    other_BTD = torch.cat([x_BTD[:, : chunk - 1], x_BTD[:, chunk - 1 : chunk] + 1, x_BTD[:, chunk:]], 1)

    def changed():
        with torch.no_grad():
            return (part(x_BTD, at(*x_BTD.shape[:2]))[0] != part(other_BTD, at(*x_BTD.shape[:2]))[0]).any(-1)[0]

    assert not changed()[: chunk - 1].any() and changed()[chunk - 1 :].all()
    with torch.no_grad():
        part.ema.gain.zero_()
    assert changed()[chunk - 1] and not changed()[chunk:].any()


def test_timestep_norm_over_a_long_document(pick):
    """Far from zero and for long: what sums of squares would lose."""
    norm = TimestepNorm(6, 2, 1e-6)
    x_BTD = torch.randn(1, 4000, 6) * 0.5 + 300
    with torch.no_grad():
        norm.prior_mean.fill_(300.0)
        y_BTD, _ = norm(x_BTD, at(1, 4000), None)
    assert abs(y_BTD[:, 2000:].std() - 1) < 0.05 and abs(y_BTD[:, 2000:].mean()) < 0.1


def test_megalodon_has_two_hops():
    """What leaves a layer is its ffn and what entered it, as the paper's residual has it."""
    decoder = models.build("megalodon", layers=1, block="norm_placement(placement=two_hop)").eval()
    block, x_BTD, span = decoder.blocks[0], torch.randn(1, 5, 64), at(1, 5)
    with torch.no_grad():
        middle_BTD = x_BTD + block.mixer(block.mixer_norm(x_BTD), span)[0]
        close(block(x_BTD, span)[0], x_BTD + block.ffn(block.ffn_norm(middle_BTD), span)[0])


def attention_pair(pick, config_class, theirs_class, rotary_class, **options):
    """Their attention, and a run of it with causal mask and rotary positions."""
    kv_heads, group, size = pick.choice([2, 4]), pick.choice([1, 3]), pick.choice([8, 16])
    config = config_class(
        hidden_size=24,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=size,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
        **options,
    )
    rotary = rotary_class(config)

    def run(part, x_BTD):
        positions_BT = torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[0], -1)
        mask = torch.full((x_BTD.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        return part(x_BTD, rotary(x_BTD, positions_BT), mask)[0]

    layer = pick.choice([0, 3])
    return theirs_class(config, layer), config, layer, run


def test_gated_attention_is_qwen3_next(pick):
    theirs, config, _, run = attention_pair(
        pick,
        Qwen3NextConfig,
        Qwen3NextAttention,
        Qwen3NextRotaryEmbedding,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
        attention_bias=pick.choice([False, True]),
    )
    heads, size = config.num_attention_heads, config.head_dim
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.3)

    def convert(p, one=0.0):
        ours = {"wo.weight": p["o_proj.weight"], "q_norm.weight": one + p["q_norm.weight"]}
        ours["k_norm.weight"] = one + p["k_norm.weight"]
        for kind in ("weight", "bias")[: 1 + config.attention_bias]:
            q, gate = p[f"q_proj.{kind}"].unflatten(0, (heads, 2, size)).unbind(1)
            ours[f"wqkv.{kind}"] = torch.cat([q.flatten(0, 1), p[f"k_proj.{kind}"], p[f"v_proj.{kind}"]])
            ours[f"wg.{kind}"] = gate.flatten(0, 1)
            ours[f"wo.{kind}"] = p[f"o_proj.{kind}"]
        return ours

    shape = {"heads": heads, "kv_heads": config.num_key_value_heads, "head_dim": size, "qk_norm": True}
    bias = {"bias": config.attention_bias, "out_bias": config.attention_bias}
    positions = "rope(theta=5000,fraction=0.25)"
    ours = GatedAttention(GatedAttention.Config(**shape, **bias, positions=positions), Place(24, eps=1e-5))
    x_BTD = torch.randn(2, pick.choice([2, 30]), 24)
    same_function(ours, theirs, convert, x_BTD, run_theirs=run, weights=partial(convert, one=1))
    with torch.no_grad():
        close(stepped(ours, x_BTD), run(theirs, x_BTD))


def test_gate_is_of_the_query_and_shuts(pick):
    """Open, it is plain attention; shut, nothing; one gate for a head is a gate for each channel with tied columns."""
    head, channel = (GatedAttention(GatedAttention.Config(gate=gate), Place(32)) for gate in ("head", "channel"))
    plain = GQA(GQA.Config(), Place(32))
    with torch.no_grad():
        for part in (channel, plain):
            part.wqkv.weight.copy_(head.wqkv.weight)
            part.wo.weight.copy_(head.wo.weight)
        channel.wg.weight.copy_(head.wg.weight.repeat_interleave(8, 0))
        x_BTD = torch.randn(2, 7, 32)
        y_BTD = head(x_BTD, at(2, 7))[0]
        close(channel(x_BTD, at(2, 7))[0], y_BTD)
        assert off(y_BTD, plain(x_BTD, at(2, 7))[0]) > 0.1
        x_BTD[..., 0] = 1
        head.wg.weight.zero_()[:, 0] = 100
        close(head(x_BTD, at(2, 7))[0], plain(x_BTD, at(2, 7))[0])
        x_BTD[0, 3, 0] = -1  # this token's gate alone
        assert not head(x_BTD, at(2, 7))[0][0, 3].any() and head(x_BTD, at(2, 7))[0][0, 4].any()


def from_diff_llama(p):
    ours = {"lambdas": torch.stack([p[f"lambda_{name}"] for name in ("q1", "k1", "q2", "k2")])}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in p:
            ours[f"wqkv.{kind}"] = torch.cat([p[f"{name}_proj.{kind}"] for name in "qkv"])
            ours[f"wo.{kind}"] = p[f"o_proj.{kind}"]
    return ours


def test_diff_transformer_is_diff_llama(pick):
    bias = pick.choice([False, True])
    theirs, config, layer, run = attention_pair(
        pick, DiffLlamaConfig, DiffLlamaAttention, DiffLlamaRotaryEmbedding, attention_bias=bias
    )
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    options = DiffTransformer.Config(heads, kv_heads, config.head_dim, bias=bias)
    ours = DiffTransformer(options, Place(24, layer, 4, eps=1e-5))
    x_BTD = torch.randn(2, pick.choice([2, 30]), 24)
    same_function(ours, theirs, from_diff_llama, x_BTD, run_theirs=run)
    with torch.no_grad():
        close(stepped(ours, x_BTD), run(theirs, x_BTD))


def test_what_both_maps_attend_to_cancels(pick):
    """Equal maps leave (1 - lambda) of what they read, and a lambda of one nothing; the norm scales it back."""
    part = DiffTransformer(DiffTransformer.Config(2, 2), Place(16, 2, 4))
    x_BTD = torch.randn(2, 9, 16)
    with torch.no_grad():
        q, k, _ = part.wqkv.weight.view(3, 2, 8, 16)
        q[1], k[1] = q[0], k[0]  # the second map is the first
        part.lambdas.zero_()  # lambda is lambda_init
        read_BTD = part(x_BTD, at(2, 9))[0]
        part.lambdas[:2] = math.log(1 + 1 - part.first) ** 0.5 / 8**0.5  # exp(.) - 1 + lambda_init = 1
        part.eps = 1e-2
        assert part(x_BTD, at(2, 9))[0].abs().max() < 1e-4 * read_BTD.abs().max()


def test_lambda_starts_by_depth():
    starts = [DiffTransformer(DiffTransformer.Config(), Place(16, layer, 9)).first for layer in range(9)]
    assert starts[0] == pytest.approx(0.2) and starts == sorted(starts) and starts[8] < 0.8


# Options that change what is remembered; the suites over the registry see each part as it comes.
OTHERS = ["rwkv6(eagle=True)", "mega(chunk=5)", "griffin(window=5)", "diff_transformer(window=5)"]


@torch.no_grad()
@pytest.mark.parametrize("state_of", [Decoder.init_state, partial(contract.paged, size=4)], ids=["contiguous", "paged"])
@pytest.mark.parametrize("check", [contract.split_anywhere, contract.kept_states], ids=lambda check: check.__name__)
@pytest.mark.parametrize("pattern", OTHERS)
def test_options_keep_the_contract(pick, pattern, check, state_of):
    ffn = "channel_mix(receptance=True)" if "rwkv" in pattern else "swiglu"
    decoder = models.build("decoder", pattern=pattern, ffn=ffn, layers=3).eval()
    for parameter in decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    check(decoder, pick.randrange(1 << 30), state_of)
