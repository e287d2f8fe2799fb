"""The linear attention family against independent implementations, and each one's idea as a property that needs it."""

import pytest
import torch
import torch.nn.functional as F
from fla.ops.based.naive import naive_parallel_based
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from models.mixers.based import Based
from models.mixers.gla import GLA
from models.mixers.hgrn import HGRN
from models.mixers.hgrn2 import HGRN2
from models.mixers.infini_attention import InfiniAttention
from models.mixers.lightning_attention import LightningAttention
from models.mixers.linear_transformer import LinearTransformer
from models.mixers.performer import Performer
from models.mixers.retnet import RetNet
from models.mixers.retnet_v2 import RetNetV2
from models.span import Span
from models.stateful import Place


def close(ours, theirs, tolerance=1e-5, what="output"):
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1e-6)
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def at(rows, tokens):
    return Span(torch.arange(tokens).expand(rows, -1))


def draw(part):
    """Every parameter at random, so that nothing is hidden by what it starts from."""
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return part


def same_as(part, definition, x_BTD):
    """Outputs and all gradients of `part` and of `definition(parameters by name, x)`.

    Both are fp32: gradients of sums over all tokens were 2e-5 apart in one draw of a thousand.
    """
    names = [name for name, _ in part.named_parameters()]
    ours = [x_BTD.clone().requires_grad_(), *part.parameters()]
    theirs = [value.detach().clone().requires_grad_() for value in ours]
    y = part(ours[0], at(*x_BTD.shape[:2]))[0]
    expected = definition(dict(zip(names, theirs[1:])), theirs[0])
    close(y, expected)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((y * weight).sum(), ours, allow_unused=True)
    wanted = torch.autograd.grad((expected * weight).sum(), theirs, allow_unused=True)
    for name, one, two in zip(["x", *names], found, wanted, strict=True):
        assert (one is None) == (two is None), name
        if two is not None:
            close(one, two, 1e-4, f"gradient of {name}")


def by_steps(part, x_BTD, chunk=1):
    """Outputs computed `chunk` tokens at a time, through the state."""
    rows, tokens = x_BTD.shape[:2]
    state, outputs = {name: spec.empty(rows, tokens) for name, spec in part.state_spec(tokens).items()}, []
    for start in range(0, tokens, chunk):
        places_BT = torch.arange(start, min(start + chunk, tokens)).expand(rows, -1)
        span = Span(places_BT, length_B=places_BT[:, 0])
        y_BTD, state = part(x_BTD[:, start : start + chunk], span, state)
        outputs.append(y_BTD)
    return torch.cat(outputs, 1)


def rms(x, weight=None, eps=1e-5):
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def turned(x_BTHK, theta=10000.0):
    """Rotary positions by complex numbers."""
    tokens, size = x_BTHK.shape[1], x_BTHK.shape[3]
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turn = torch.polar(torch.ones(()).double(), torch.arange(tokens).double()[:, None] * frequency)[:, None]
    one, two = x_BTHK.double().chunk(2, -1)
    turning = torch.complex(one, two) * turn
    return torch.cat([turning.real, turning.imag], -1).to(x_BTHK.dtype)


def test_retnet_is_retention(pick):
    heads, size, expand, tokens = pick.choice([1, 3]), pick.choice([4, 16]), pick.choice([1, 2]), pick.choice([1, 40])
    part = draw(RetNet(RetNet.Config(heads, expand), Place(heads * size)))

    def definition(p, x_BTD):
        q, k, v, gate = (p["wi.weight"] @ x_BTD.mT).mT.split(part.widths, -1)
        q, k, v = (z.unflatten(-1, (heads, -1)) for z in (q, k, v))
        y = naive_retention(*(z.transpose(1, 2) for z in (turned(q), turned(k), v))).transpose(1, 2)
        return (rms(y, eps=1e-6).flatten(2) * F.silu(gate)) @ p["wo.weight"].T

    same_as(part, definition, torch.randn(2, tokens, heads * size))


def test_retention_has_three_forms(pick):
    """Parallel = recurrent = chunkwise, and every head forgets a pulse at a rate of its own."""
    part = RetNet(RetNet.Config(heads=3, positions="nope"), Place(24))
    x_BTD = torch.randn(2, 37, 24)
    parallel = part(x_BTD, at(2, 37))[0]
    close(by_steps(part, x_BTD), parallel)
    close(by_steps(part, x_BTD, pick.randint(2, 20)), parallel)
    ones, pulse = torch.ones(1, 30, 3, 8), torch.ones(1, 30, 3, 16)
    pulse[:, 1:] = 0
    with torch.no_grad():
        y_BTHV, _ = part.remember(ones, ones, pulse, part.decay(None).expand(1, 30, 3), at(1, 30), None)
    rate_H = y_BTHV[0, 29, :, 0] / y_BTHV[0, 28, :, 0]
    close(rate_H, torch.tensor([1 - 2.0**-5, 1 - 2.0**-6, 1 - 2.0**-7]))


def test_retention_sees_distance_alone(pick):
    """xPos: scores depend on the distance, so a document moved along its positions reads the same."""
    part, shift = RetNet(RetNet.Config(heads=2), Place(32)), pick.randint(1, 300)
    x_BTD = torch.randn(1, 20, 32)
    here = part(x_BTD, at(1, 20))[0]
    close(part(x_BTD, Span(torch.arange(20)[None] + shift))[0], here, 1e-4)
    still = RetNet(RetNet.Config(heads=2, positions="nope"), Place(32))
    still.load_state_dict(part.state_dict())
    assert (still(x_BTD, at(1, 20))[0] - here).abs().max() > 0.01 * here.abs().max()


def test_lightning_attention_is_minimax(pick):
    heads, size, layers = pick.choice([1, 2, 4]), pick.choice([4, 8]), pick.choice([1, 2, 5])
    layer, tokens, dim = pick.randrange(layers), pick.choice([1, 30, 50]), 16
    config = MiniMaxConfig(
        hidden_size=dim,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=size,
        num_hidden_layers=layers,
        block_size=pick.choice([4, 16, 256]),
    )
    theirs = draw(MiniMaxLightningAttention(config, layer))
    ours = LightningAttention(LightningAttention.Config(heads, size), Place(dim, layer, layers))
    names = {
        "wqkv.weight": theirs.qkv_proj.weight,
        "wg.weight": theirs.output_gate.weight,
        "norm.weight": theirs.norm.weight,
        "wo.weight": theirs.out_proj.weight,
    }
    ours.load_state_dict(names)
    x_BTD = torch.randn(2, tokens, dim)

    def definition(p, x_BTD):
        renamed = {other: p[ours] for ours, value in names.items() for other in [_name(theirs, value)]}
        return torch.func.functional_call(theirs, renamed, (x_BTD, None, None))[0]

    same_as(ours, definition, x_BTD)
    # Their prefill and steps through a cache, ours through the state.
    cache, outputs = MiniMaxCache(), []
    with torch.no_grad():
        for t in range(tokens):
            outputs.append(theirs(x_BTD[:, t : t + 1], None, None, cache)[0])
    close(by_steps(ours, x_BTD), torch.cat(outputs, 1))
    close(by_steps(ours, x_BTD, 7), torch.cat(outputs, 1))


def _name(module, value):
    return next(name for name, parameter in module.named_parameters() if parameter is value)


def test_lightning_attention_slows_with_depth():
    """Higher layers forget less, the last almost nothing: a pulse stays."""
    kept = []
    for layer in range(3):
        torch.manual_seed(0)
        part = LightningAttention(LightningAttention.Config(heads=2), Place(16, layer, 3))
        pulse = torch.zeros(1, 20, 16)
        pulse[:, 0] = 1
        state = {"matrix": torch.zeros(1, 2, 8, 8)}
        _, state = part(pulse, at(1, 20), state)
        kept.append(state["matrix"].norm())
    assert kept[0] < kept[1] < kept[2]


def test_gla_is_the_paper(pick):
    heads, size, rank, tokens = pick.choice([1, 3]), pick.choice([4, 12]), pick.choice([2, 5]), pick.choice([1, 45])
    root, keys = pick.choice([1.0, 16.0]), pick.choice([0.5, 1.0])
    part = draw(GLA(GLA.Config(heads, keys, rank, root), Place(heads * size)))

    def definition(p, x_BTD):
        *heads_of, low = (x_BTD @ p["wi.weight"].T).split(part.widths, -1)
        q, k, v, gate = (z.unflatten(-1, (heads, -1)) for z in heads_of)
        decay = F.logsigmoid(low @ p["wa.weight"].T + p["wa.bias"]).unflatten(-1, (heads, -1)) / root
        y = naive_recurrent_gla(q, k, v, decay)[0]
        return (rms(y, p["norm.weight"]) * F.silu(gate)).flatten(2) @ p["wo.weight"].T

    x_BTD = torch.randn(2, tokens, heads * size)
    same_as(part, definition, x_BTD)
    close(by_steps(part, x_BTD, pick.randint(1, 9)), part(x_BTD, at(2, tokens))[0])


def test_gla_forgets_per_channel_by_the_token():
    """One token closes the gate of one key channel of one head: that row of the memory goes, and no other."""
    part = draw(GLA(GLA.Config(heads=2, rank=1, root=1.0), Place(16)))
    torch.nn.init.zeros_(part.wa.weight)
    torch.nn.init.constant_(part.wa.bias, 50.0)  # all open
    with torch.no_grad():
        part.wa.weight[2] = 1.0
        part.wi.weight[-1] = 0
        part.wi.weight[-1, 0] = -1.0
        x_BTD = torch.randn(1, 9, 16)
        x_BTD[..., 0] = 0
        x_BTD[:, -1] = 0
        x_BTD[:, -1, 0] = 500.0
        state = {"matrix": torch.zeros(1, 2, 4, 8)}
        _, before = part(x_BTD[:, :-1], at(1, 8), state)
        # What the last token writes, apart.
        _, written = part(x_BTD[:, -1:], at(1, 1), state)
        _, after = part(x_BTD[:, -1:], at(1, 1), before)
    kept = (after["matrix"] - written["matrix"])[0].flatten(0, 1)
    scale = written["matrix"].abs().max()
    before = before["matrix"][0].flatten(0, 1)
    assert before.norm(dim=-1).min() > 0 and kept[2].norm() < 1e-6 * scale
    others = [0, 1, 3, 4, 5, 6, 7]
    assert (kept[others] - before[others]).abs().max() < 1e-6 * scale


def bounds(logits_LD):
    """The papers' lower bounds."""
    share = logits_LD.softmax(0)
    return share.cumsum(0) - share[0]


def rises(logits_LD):
    """Our parameters that give the same: of what is left above a bound, the share that the next one takes."""
    bound = bounds(logits_LD)
    return torch.logit((bound[1:] - bound[:-1]) / (1 - bound[:-1]))


@pytest.mark.parametrize("kind", [HGRN, HGRN2])
def test_hgrn_is_the_paper(pick, kind):
    """A stack of layers without residuals, so that the bounds climb."""
    heads, size, layers, tokens = pick.choice([1, 2]), pick.choice([4, 8]), pick.choice([1, 2, 4]), pick.choice([1, 30])
    dim = heads * size
    expand, key_dim = pick.choice([1, 2]), pick.choice([0, 5])
    config = HGRN.Config(expand) if kind is HGRN else HGRN2.Config(heads, key_dim)
    stack = torch.nn.ModuleList(draw(kind(config, Place(dim, layer, layers))) for layer in range(layers))
    width = expand * dim if kind is HGRN else heads * (key_dim or size)
    logits_LD = torch.randn(layers, width)
    with torch.no_grad():
        for layer, rise in zip(stack[1:], rises(logits_LD)):
            layer.forget.rise.copy_(rise)
    bound_LD = bounds(logits_LD)
    x_BTD = torch.randn(2, tokens, dim)
    one, two = (x_BTD.clone().requires_grad_() for _ in range(2))
    y_BTD, span = one, at(2, tokens)
    for layer in stack:
        y_BTD = layer(y_BTD, span)[0]
    theirs = two
    copies = []
    for layer, bound in zip(stack, bound_LD):
        p = {n: value.detach().clone().requires_grad_() for n, value in layer.named_parameters() if "rise" not in n}
        copies.append(p)
        projected = theirs @ p["wi.weight"].T
        if kind is HGRN:
            i, z, gate = projected.chunk(3, -1)
            f = bound + (1 - bound) * z.sigmoid()
            h = naive_recurrent_hgrn(F.silu(i) * (1 - f), f.log())[0]
            theirs = (rms(h, p["norm.weight"]) * F.silu(gate)) @ p["wo.weight"].T
        else:
            q, z, v = projected.split(layer.widths, -1)
            f = bound + (1 - bound) * z.sigmoid()
            q, k, v, f = (x.unflatten(-1, (heads, -1)) for x in (F.silu(q), 1 - f, v, f))
            theirs = rms(naive_recurrent_gla(q, k, v, f.log())[0].flatten(2), p["norm.weight"]) @ p["wo.weight"].T
    close(y_BTD, theirs, 3e-5)
    weight = torch.randn_like(theirs)
    leaves = [(one, two)] + [
        (dict(layer.named_parameters())[n], v) for layer, p in zip(stack, copies) for n, v in p.items()
    ]
    found = torch.autograd.grad((y_BTD * weight).sum(), [ours for ours, _ in leaves])
    wanted = torch.autograd.grad((theirs * weight).sum(), [their for _, their in leaves])
    for ours, their in zip(found, wanted):
        close(ours, their, 1e-4, "gradient")


@pytest.mark.parametrize("kind", [HGRN, HGRN2])
def test_forget_gates_rise_with_depth(kind):
    """Gates told to forget all keep the bound of their layer: l / layers as they start, never 1."""
    layers = 4
    stack = [kind(kind.Config(), Place(16, layer, layers)) for layer in range(layers)]
    span, floor = at(1, 1), []
    for layer in stack:
        log_f, write = layer.forget(torch.full((1, 1, 16), -60.0), span)
        close(log_f.exp() + write, torch.ones_like(write))
        floor.append(log_f.exp().mean().item())
    assert floor == pytest.approx([0, 0.25, 0.5, 0.75], abs=1e-6)
    # What it is for: a pulse outlasts more tokens in a higher layer, whatever the gates say.
    span = at(1, 12)
    kept = [layer.forget(torch.full((1, 12, 16), -60.0), span)[0].sum(1).exp() for layer in stack]
    assert (kept[0] < 1e-20).all() and (kept[3] > 1e-3).all()


def test_hgrn2_writes_what_it_forgets(pick):
    """k = 1 - f: a value that never changes is what the memory becomes, whatever the gates do, and never more."""
    part = draw(HGRN2(HGRN2.Config(heads=2), Place(16)))
    span, state = at(1, 200), {"matrix": torch.zeros(1, 2, 8, 8)}
    x_BTD = torch.randn(1, 200, 16)
    with torch.no_grad():
        part.wi.weight[-16:, 1:] = 0  # values read channel 0 alone
        x_BTD[..., 0] = 1.5
        _, state = part(x_BTD, span, state)
    value_HV = 1.5 * part.wi.weight[-16:, 0].view(2, 8)
    close(state["matrix"][0], value_HV[:, None].expand(2, 8, 8), 1e-3)


def test_linear_transformer_is_the_paper(pick):
    heads, size, tokens = pick.choice([1, 3]), pick.choice([4, 16]), pick.choice([1, 60])
    part = draw(LinearTransformer(LinearTransformer.Config(heads), Place(heads * size)))

    def definition(p, x_BTD):
        q, k, v = (z.unflatten(-1, (heads, size)) for z in (x_BTD @ p["wqkv.weight"].T).chunk(3, -1))
        y = naive_recurrent_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, normalize=True)[0]
        return y.flatten(2) @ p["wo.weight"].T

    same_as(part, definition, torch.randn(2, tokens, heads * size))


def test_linear_transformer_averages_values(pick):
    """Parallel = recurrent; weights are positive and add up to one, so a value that stays comes out as it is."""
    part = LinearTransformer(LinearTransformer.Config(heads=2), Place(16))
    x_BTD = torch.randn(2, 50, 16)
    parallel = part(x_BTD, at(2, 50))[0]
    close(by_steps(part, x_BTD), parallel)
    close(by_steps(part, x_BTD, pick.randint(2, 30)), parallel)
    with torch.no_grad():
        part.wqkv.weight[-16:, 1:] = 0  # values read channel 0 alone
        x_BTD[..., 0] = 2.0
        value_D = 2 * part.wqkv.weight[-16:, 0]
        close(part(x_BTD, at(2, 50))[0], (part.wo.weight @ value_D).expand(2, 50, 16))


def test_retnet_v2_is_normalised_retention(pick):
    """The paper's two divisions of the scores, one after the other, in its parallel form."""
    heads, size, expand, tokens = pick.choice([1, 3]), pick.choice([4, 16]), pick.choice([1, 2]), pick.choice([1, 40])
    part = draw(RetNetV2(RetNetV2.Config(heads, expand), Place(heads * size)))

    def definition(p, x_BTD):
        q, k, v, gate = (x_BTD @ p["wi.weight"].T).split(part.widths, -1)
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        q, k = (turned(z.transpose(1, 2)).transpose(1, 2) for z in (q, k))
        decay_H = 1 - 2.0 ** (-5 - torch.arange(heads))
        root_HT1 = torch.stack([(decay_H[:, None] ** torch.arange(t + 1)).sum(1) for t in range(tokens)], 1).sqrt()[
            ..., None
        ]
        scores = naive_retention(q, k, torch.ones_like(v[..., :1])) / root_HT1
        y = naive_retention(q, k, v) / root_HT1 / scores.abs().clamp(min=1)
        return (y.transpose(1, 2).flatten(2) * F.silu(gate)) @ p["wo.weight"].T

    x_BTD = 2 * torch.randn(2, tokens, heads * size)
    same_as(part, definition, x_BTD)
    close(by_steps(part, x_BTD, pick.randint(1, 9)), part(x_BTD, at(2, tokens))[0])


class Unnormalised(RetNetV2):
    """The idea taken out: retention as it accumulates."""

    def retain(self, q_BTHK, k_BTHK, v_BTHV, at, state):
        y_BTHV, state = RetNetV2.remember(
            self,
            q_BTHK,
            k_BTHK,
            F.pad(v_BTHV, (0, 1), value=1.0),
            self.decay(None).expand(*q_BTHK.shape[:3]),
            at,
            state,
            scale=self.head_dim**-0.5,
        )
        return y_BTHV[..., :-1], state


def test_retnet_v2_is_stable_at_32k_tokens_in_bf16(pick):
    """Error against float64 in units of the stream that outputs are added to, over chunks that carry the state."""
    tokens, dim = 32768, 64
    x_BTD = (0.5 + torch.randn(1, tokens, dim)).bfloat16()
    errors, sizes = [], []
    weights = draw(RetNetV2(RetNetV2.Config(heads=8, expand=1), Place(dim))).bfloat16().state_dict()
    for kind in (RetNetV2, Unnormalised):
        part = kind(RetNetV2.Config(heads=8, expand=1), Place(dim)).bfloat16()
        part.load_state_dict(weights)
        with torch.no_grad():
            y_BTD = by_steps(part, x_BTD, 8192)[:, -1024:].double()
            exact_BTD = part.double()(x_BTD.double(), at(1, tokens))[0][:, -1024:]
        errors.append((y_BTD - exact_BTD).square().mean().sqrt().item())
        sizes.append(exact_BTD.square().mean().sqrt().item())
    print(errors, sizes)
    assert errors[0] < 0.02 and sizes[0] < 2
    assert errors[1] > 0.1


def softmax_weights(q_THK, k_THK):
    scores = torch.einsum("thk,shk->hts", q_THK, k_THK) * q_THK.shape[-1] ** -0.5
    tokens = len(q_THK)
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)


def test_performer_estimates_softmax():
    """The error falls as features grow, about with the root of their number."""
    torch.manual_seed(0)
    q, k = 0.5 * torch.randn(2, 40, 4, 16).double()
    exact = softmax_weights(q, k)
    errors = []
    for count in (16, 256, 4096):
        squares = []
        for _ in range(6):
            part = Performer(Performer.Config(heads=4, features=count), Place(64)).double()
            one, two = part.features(q[None], k[None])
            assert one.min() > 0 and two.min() > 0
            found = torch.einsum("thf,shf->hts", one[0], two[0]).tril()
            squares.append((found / found.sum(-1, keepdim=True) - exact).square().mean().item())
        errors.append((sum(squares) / 6) ** 0.5)
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.4 * errors[1], errors


def test_performer_reads_what_its_features_weigh(pick):
    """The layer is softmax attention with estimated weights; and the estimate of exp(q . k / sqrt(K)) has no bias."""
    heads, size, tokens = pick.choice([1, 2]), pick.choice([4, 8]), pick.choice([1, 33])
    part = draw(Performer(Performer.Config(heads, features=pick.choice([8, 30])), Place(heads * size)))

    def definition(p, x_BTD):
        q, k, v = (z.unflatten(-1, (heads, size)) for z in (x_BTD @ p["wqkv.weight"].T).chunk(3, -1))
        logs = [
            (z * size**-0.25) @ part.directions.T - z.square().sum(-1, keepdim=True) / size**0.5 / 2 for z in (q, k)
        ]
        one, two = logs[0].sub(logs[0].detach().amax(-1, keepdim=True)).exp() + 1e-6, logs[1].exp() + 1e-6
        weights = torch.einsum("bthf,bshf->bhts", one, two).tril()
        y = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
        return y.flatten(2) @ p["wo.weight"].T

    x_BTD = torch.randn(2, tokens, heads * size)
    same_as(part, definition, x_BTD)
    close(by_steps(part, x_BTD, pick.randint(1, 9)), part(x_BTD, at(2, tokens))[0])


def test_performer_draws_orthogonal_directions():
    torch.manual_seed(0)
    rows = Performer(Performer.Config(heads=1, features=20), Place(8)).directions
    for block in (rows[:8], rows[8:16], rows[16:]):
        gram = F.normalize(block, dim=-1) @ F.normalize(block, dim=-1).T
        assert (gram - torch.eye(len(block))).abs().max() < 1e-5
    many = Performer(Performer.Config(heads=1, features=80000), Place(8)).directions
    assert many.mean(0).abs().max() < 0.02  # no side avoided
    assert (many.T @ many / len(many) - torch.eye(8)).abs().max() < 0.03  # Gaussian each
    # Orthogonal rows estimate better than independent ones: what they are for.
    x, y = torch.randn(2, 200, 1, 8)
    exact = (x * y).sum(-1).mul(8**-0.5).exp()[:, 0]
    part, errors = Performer(Performer.Config(heads=1, features=8), Place(8)), {}
    for name in ("orthogonal", "independent"):
        found = []
        for _ in range(300):
            fresh = Performer(Performer.Config(heads=1, features=8), Place(8)).directions
            part.directions = fresh if name == "orthogonal" else torch.randn(8, 8)
            found.append((part._exponent(x) + part._exponent(y)).exp().mean(-1)[:, 0])
        errors[name] = ((torch.stack(found) - exact) / exact).square().mean().item()
    assert errors["orthogonal"] < 0.9 * errors["independent"], errors


def test_based_is_taylor_and_window(pick):
    heads, size, key_dim = pick.choice([1, 2]), pick.choice([4, 8]), pick.choice([1, 3, 8])
    window, tokens = pick.choice([1, 5]), pick.choice([1, 40])
    part = draw(Based(Based.Config(heads, key_dim, window), Place(heads * size)))

    def definition(p, x_BTD):
        parts = (x_BTD @ p["wi.weight"].T).split(part.widths, -1)
        q, k, v, near_q, near_k, near_v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in parts)
        y = naive_parallel_based(q, k, v)
        near_q, near_k = (turned(z.transpose(1, 2)).transpose(1, 2) for z in (near_q, near_k))
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        w = F.scaled_dot_product_attention(near_q, near_k, near_v, attn_mask=(distance >= 0) & (distance < window))
        return torch.cat([y, w], -1).transpose(1, 2).flatten(2) @ p["wo.weight"].T

    x_BTD = torch.randn(2, tokens, heads * size)
    same_as(part, definition, x_BTD)
    close(by_steps(part, x_BTD, pick.randint(1, 9)), part(x_BTD, at(2, tokens))[0])


def test_based_features_are_taylors_series():
    """Of second order: what is left of exp falls with the third power of the score."""
    torch.manual_seed(0)
    part = Based(Based.Config(heads=1, key_dim=6), Place(8)).double()
    q, k = torch.randn(2, 1, 30, 1, 6).double()
    left = []
    for size in (1.0, 0.1):
        score = size * (q * k).sum(-1) * 6**-0.5
        left.append(((part.features(size * q) * part.features(k)).sum(-1) - score.exp()).abs())
    assert part.features(q).shape[-1] == 1 + 6 + 21
    ratio = (left[0] / left[1]).median()
    assert 700 < ratio < 1400, ratio


def test_based_needs_both():
    """Beyond the window only linear attention carries anything, and the state does not grow."""
    torch.manual_seed(0)
    part = draw(Based(Based.Config(heads=2, window=4), Place(16)))
    x_BTD = torch.randn(1, 30, 16)
    other = x_BTD.clone()
    other[:, 0] += 1
    with torch.no_grad():
        changed_T = (part(x_BTD, at(1, 30))[0] - part(other, at(1, 30))[0])[0].abs().amax(-1)
        assert changed_T[20:].min() > 1e-5
        part.wo.weight.unflatten(1, (2, 2, 8))[:, :, 0] = 0  # linear attention silent
        changed_T = (part(x_BTD, at(1, 30))[0] - part(other, at(1, 30))[0])[0].abs().amax(-1)
        assert changed_T[:4].min() > 1e-5 and changed_T[4:].max() == 0
    assert part.state_spec(10**6)["k"].capacity(10**6) < 4 + 64


def infini_by_hand(p, x_TD, heads, segment):
    """The paper, a segment after the other: retrieve from the memory, attend, update the memory."""
    tokens, dim = x_TD.shape
    q, k, v = (z.unflatten(-1, (heads, -1)) for z in (x_TD @ p["wqkv.weight"].T).chunk(3, -1))
    near_q, near_k = (turned(z[None])[0] for z in (q, k))
    size, outputs, memory = dim // heads, [], None
    for start in range(0, tokens, segment):
        part = slice(start, start + segment)
        far = torch.zeros_like(v[part])
        if memory is not None:
            one = F.elu(q[part]) + 1
            far = torch.einsum("thk,hkv->thv", one, memory[0]) / torch.einsum("thk,hk->th", one, memory[1])[..., None]
        near = torch.einsum("hts,shv->thv", softmax_weights(near_q[part], near_k[part]), v[part])
        mix = p["mix"].sigmoid()[:, None]
        outputs.append(mix * far + (1 - mix) * near)
        two = F.elu(k[part]) + 1
        update = torch.einsum("thk,thv->hkv", two, v[part]), two.sum(0)
        memory = update if memory is None else (memory[0] + update[0], memory[1] + update[1])
    assert q.shape[-1] == size
    return torch.cat(outputs).flatten(1) @ p["wo.weight"].T


def test_infini_attention_is_the_paper(pick):
    heads, size, segment = pick.choice([1, 3]), pick.choice([4, 8]), pick.choice([1, 4, 7])
    tokens = pick.choice([segment + 1, 3 * segment + pick.randint(0, 5)])
    part = draw(InfiniAttention(InfiniAttention.Config(heads, segment), Place(heads * size)))
    x_BTD = torch.randn(2, tokens, heads * size)

    def definition(p, x_BTD):
        return torch.stack([infini_by_hand(p, x_TD, heads, segment) for x_TD in x_BTD])

    same_as(part, definition, x_BTD)
    close(by_steps(part, x_BTD, pick.randint(1, 2 * segment)), part(x_BTD, at(2, tokens))[0])


def test_infini_attention_remembers_in_a_state_that_does_not_grow():
    torch.manual_seed(0)
    part = draw(InfiniAttention(InfiniAttention.Config(heads=2, segment=4), Place(16)))
    spec = part.state_spec(10**6)
    assert sum(s.bytes(10**6) for s in spec.values()) == sum(s.bytes(10**3) for s in spec.values())
    x_BTD = torch.randn(1, 30, 16)
    other, swapped = x_BTD.clone(), x_BTD.clone()
    other[:, 1] += 1
    swapped[:, [4, 6]] = swapped[:, [6, 4]]

    def changed(x):
        return (part(x, at(1, 30))[0] - part(x_BTD, at(1, 30))[0])[0].abs().amax(-1)

    with torch.no_grad():
        assert changed(other)[1:].min() > 1e-5
        assert changed(swapped)[4:8].max() > 1e-3 and changed(swapped)[8:].max() < 1e-6  # memory knows no order
        part.mix.fill_(-200.0)  # no memory: attention inside segments is left
        assert changed(other)[1:4].min() > 1e-5 and changed(other)[4:].max() == 0
        part.mix.fill_(200.0)  # memory alone: nothing is heard before a segment is over
        assert changed(other)[:4].max() == 0 and changed(other)[4:].min() > 1e-6
        assert (part(x_BTD, at(1, 30))[0][:, :4] == 0).all()
