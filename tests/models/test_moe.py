"""Mixtures of experts against independent implementations, and what each of them promises."""

import math
import socket
from dataclasses import replace

import contract
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import DeepseekV3Config, Llama4TextConfig, MixtralConfig, NemotronHConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

import models
from models.ffn.moe import MoE
from models.ffn.moe_v2 import MoEV2
from models.ffn.soft_moe import SoftMoE
from models.ffn.switch_moe import SwitchMoE
from models.layers.experts import Experts, units
from models.span import Span
from models.stateful import Place


def close(ours, theirs, tolerance=1e-5, what="output"):
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1e-3)
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def at(rows, tokens, segments_BT=None):
    return Span(torch.arange(tokens).expand(rows, -1), segments_BT=segments_BT)


def sizes(pick):
    """Experts, active ones, width, hidden units, rows and tokens.

    Two active at least: the weights of one, divided by their sum, are a constant, whose gradient is rounding alone.
    """
    experts = pick.choice([4, 8, 12])
    return (
        experts,
        pick.randint(2, 4),
        pick.choice([16, 40]),
        pick.choice([8, 24]),
        pick.choice([1, 3]),
        pick.choice([1, 19]),
    )


def same(ours, theirs, pairs, rows, tokens, dim):
    """Weights drawn in theirs and copied: outputs, and gradients of x and of every weight.

    Theirs is a function of x; pairs hold our parameter, their parameter, and how theirs is laid out.
    """
    for one, two, turn in pairs:
        torch.nn.init.normal_(two, std=two.shape[-1] ** -0.5)
        with torch.no_grad():
            one.copy_(turn(two))
    x = torch.randn(rows, tokens, dim)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(ours_x, at(rows, tokens))[0], theirs(theirs_x).view_as(x)
    close(y, expected)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((y * weight).sum(), [ours_x, *(one for one, _, _ in pairs)])
    wanted = torch.autograd.grad((expected * weight).sum(), [theirs_x, *(two for _, two, _ in pairs)])
    close(found[0], wanted[0], what="gradient of x")
    for (_, _, turn), one, two in zip(pairs, found[1:], wanted[1:], strict=True):
        close(one, turn(two), what=f"gradient of a weight {tuple(one.shape)}")


def mT(weight):
    return weight.mT


def as_is(weight):
    return weight


def test_moe_is_mixtral(pick):
    experts, active, dim, hidden, rows, tokens = sizes(pick)
    config = MixtralConfig(
        hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=active
    )
    theirs = MixtralSparseMoeBlock(config)
    ours = MoE(MoE.Config(hidden=hidden, experts=experts, active=active, balance=0.5), Place(dim))
    pairs = [
        (ours.router.weight, theirs.gate.weight, as_is),
        (ours.experts.wi, theirs.experts.gate_up_proj, mT),
        (ours.experts.wo, theirs.experts.down_proj, mT),
    ]
    same(ours.eval(), theirs, pairs, rows, tokens, dim)
    # Router logits and the balance loss, with padding left out.
    x, mask = torch.randn(3, 7, dim), torch.ones(3, 7)
    mask[1, 4:] = 0
    logits = theirs.gate(x)[0]
    close(ours.router(x).flatten(0, 1), logits)
    span = at(3, 7, mask.long() - 1)
    ours.train()(x, span)
    expected = load_balancing_loss_func((logits,), experts, active, mask)
    close(span.losses[0], 0.5 * expected, what="balance loss")
    close(span.metrics["balance"][0], expected, what="balance")


def test_moe_v2_is_deepseek(pick):
    groups = pick.choice([1, 2, 4])
    best = pick.randint(1, groups)
    experts, (_, _, dim, hidden, rows, tokens) = groups * pick.choice([2, 3]), sizes(pick)
    active, shared = pick.randint(1, best * (experts // groups)), pick.choice([1, 2])
    normalize, scale = active > 1 and pick.choice([True, False]), pick.choice([1.0, 2.5])
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=dim,
            moe_intermediate_size=hidden,
            n_routed_experts=experts,
            num_experts_per_tok=active,
            n_shared_experts=shared,
            n_group=groups,
            topk_group=best,
            norm_topk_prob=normalize,
            routed_scaling_factor=scale,
        )
    )
    ours = MoEV2(
        MoEV2.Config(
            hidden=hidden,
            experts=experts,
            active=active,
            shared=shared * hidden,
            groups=groups,
            best_groups=best,
            normalize=normalize,
            scale=scale,
        ),
        Place(dim),
    )
    theirs.gate.e_score_correction_bias.uniform_(0, 0.5)  # theirs takes masked experts where all others are below 0
    ours.bias.copy_(theirs.gate.e_score_correction_bias)
    shared_wi = torch.cat([theirs.shared_experts.gate_proj.weight, theirs.shared_experts.up_proj.weight])
    with torch.no_grad():
        ours.shared.wi.weight.copy_(shared_wi)
        ours.shared.wo.weight.copy_(theirs.shared_experts.down_proj.weight)
    pairs = [
        (ours.router.weight, theirs.gate.weight, as_is),
        (ours.experts.wi, theirs.experts.gate_up_proj, mT),
        (ours.experts.wo, theirs.experts.down_proj, mT),
    ]
    same(ours.eval(), theirs, pairs, rows, tokens, dim)


def test_moe_v2_is_qwen3_next(pick):
    experts, active, dim, hidden, rows, tokens = sizes(pick)
    theirs = Qwen3NextSparseMoeBlock(
        Qwen3NextConfig(
            hidden_size=dim,
            moe_intermediate_size=hidden,
            shared_expert_intermediate_size=2 * hidden,
            num_experts=experts,
            num_experts_per_tok=active,
            norm_topk_prob=True,
        )
    )
    options = {"experts": experts, "active": active, "shared": 2 * hidden, "shared_gate": True, "score": "softmax"}
    ours = MoEV2(MoEV2.Config(hidden=hidden, **options), Place(dim))
    with torch.no_grad():
        shared = theirs.shared_expert
        ours.shared.wi.weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        ours.shared.wo.weight.copy_(shared.down_proj.weight)
    pairs = [
        (ours.router.weight, theirs.gate.weight, as_is),
        (ours.experts.wi, theirs.experts.gate_up_proj, mT),
        (ours.experts.wo, theirs.experts.down_proj, mT),
        (ours.shared_gate.weight, theirs.shared_expert_gate.weight, as_is),
    ]
    same(ours.eval(), theirs, pairs, rows, tokens, dim)


def test_moe_v2_is_llama4(pick):
    experts, _, dim, hidden, rows, tokens = sizes(pick)
    active = pick.choice([1, 2])
    theirs = Llama4TextMoe(
        Llama4TextConfig(
            hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=active
        )
    )
    options = {"experts": experts, "active": active, "shared": hidden, "normalize": False, "weigh": "input"}
    ours = MoEV2(MoEV2.Config(hidden=hidden, **options), Place(dim))
    with torch.no_grad():
        shared = theirs.shared_expert
        ours.shared.wi.weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        ours.shared.wo.weight.copy_(shared.down_proj.weight)
    pairs = [
        (ours.router.weight, theirs.router.weight, as_is),
        (ours.experts.wi, theirs.experts.gate_up_proj, as_is),
        (ours.experts.wo, theirs.experts.down_proj, as_is),
    ]
    same(ours.eval(), lambda x: theirs(x)[0], pairs, rows, tokens, dim)


@pytest.mark.parametrize("latent", [0, 8])
def test_moe_v2_is_nemotron(pick, latent):
    experts, active, dim, hidden, rows, tokens = sizes(pick)
    theirs = NemotronHMoE(
        NemotronHConfig(
            hidden_size=dim,
            layers_block_type=["moe"],
            moe_intermediate_size=hidden,
            moe_shared_expert_intermediate_size=3 * hidden,
            moe_latent_size=latent or None,
            n_routed_experts=experts,
            num_experts_per_tok=active,
            routed_scaling_factor=1.5,
        )
    )
    options = {"experts": experts, "active": active, "shared": 3 * hidden, "latent": latent, "scale": 1.5}
    ours = MoEV2(MoEV2.Config(hidden=hidden, activation="relu2", **options), Place(dim))
    pairs = [
        (ours.router.weight, theirs.gate.weight, as_is),
        (ours.experts.wi, theirs.experts.up_proj, mT),
        (ours.experts.wo, theirs.experts.down_proj, mT),
        (ours.shared.wi.weight, theirs.shared_experts.up_proj.weight, as_is),
        (ours.shared.wo.weight, theirs.shared_experts.down_proj.weight, as_is),
    ]
    if latent:
        pairs += [
            (ours.into.weight, theirs.fc1_latent_proj.weight, as_is),
            (ours.wo.weight, theirs.fc2_latent_proj.weight, as_is),
        ]
    same(ours.eval(), theirs, pairs, rows, tokens, dim)


def test_switch_moe_is_switch_transformers(pick):
    """In training with the same room for each expert; theirs in eval counts room as well, ours does not."""
    experts, _, dim, hidden, rows, tokens = sizes(pick)
    capacity = pick.choice([0.5, 1.0, 1.25])
    room = math.ceil(capacity * tokens / experts)
    theirs = SwitchTransformersSparseMLP(
        SwitchTransformersConfig(
            d_model=dim,
            d_ff=hidden,
            num_experts=experts,
            expert_capacity=room,
            router_jitter_noise=0.0,
            dropout_rate=0.0,
        )
    )
    ours = SwitchMoE(SwitchMoE.Config(hidden=hidden, experts=experts, capacity=capacity, balance=0.0), Place(dim))
    dense = [theirs.experts[f"expert_{e}"] for e in range(experts)]
    pairs = [(ours.router.weight, theirs.router.classifier.weight, as_is)]
    for e, expert in enumerate(dense):
        with torch.no_grad():
            ours.experts.wi[e] = expert.wi.weight.mT
            ours.experts.wo[e] = expert.wo.weight.mT
    x = torch.randn(rows, tokens, dim)
    same(ours, theirs, pairs, rows, tokens, dim)
    weight = torch.randn(rows, tokens, dim)
    (ours(x, at(rows, tokens))[0] * weight).sum().backward()
    (theirs(x) * weight).sum().backward()
    for name in ("wi", "wo"):
        expected = torch.stack(
            [
                torch.zeros_like(w) if w.grad is None else w.grad
                for w in (getattr(expert, name).weight for expert in dense)
            ]
        )
        close(getattr(ours.experts, name).grad, expected.mT, what=f"gradient of {name}")


def test_switch_drops_what_finds_no_room(pick):
    """All tokens want one expert: the first of each row have it, the others pass by; padding takes no room."""
    ours = SwitchMoE(SwitchMoE.Config(experts=4, capacity=1.0), Place(16))
    with torch.no_grad():
        ours.router.weight.zero_()
    x, segments_BT = torch.randn(2, 16, 16), torch.zeros(2, 16, dtype=torch.int64)
    segments_BT[1, ::2] = -1
    span = at(2, 16, segments_BT)
    y = ours(x, span)[0].abs().sum(-1) > 0
    assert y[0].tolist() == [True] * 4 + [False] * 12
    assert y[1, 1::2].tolist() == [True] * 4 + [False] * 4
    close(span.metrics["dropped"][0], torch.tensor(16 / 24), what="dropped")
    for state in (None, {}):
        everybody = ours.train(state is not None)(x, span, state)[0].abs().sum(-1) > 0
        assert everybody[segments_BT >= 0].all()


def test_the_bias_steers_choices_and_nothing_else(pick):
    """A bias changes who is chosen; where the choice stays so does the output, but for the order of sums."""
    part = MoEV2(MoEV2.Config(experts=8, active=2, shared=0), Place(16)).eval()
    x = torch.randn(1, 30, 16)
    plain = part(x, at(1, 30))[0]
    part.bias += 0.3  # the same for all
    close(part(x, at(1, 30))[0], plain)
    part.bias[3] += 10
    logits = part.router(x)
    had_3 = (logits.topk(2).indices == 3).any(-1)[0]
    steered = part(x, at(1, 30))[0]
    if had_3.any():
        close(steered[0, had_3], plain[0, had_3])
    assert (steered[0, ~had_3] != plain[0, ~had_3]).any(-1).all()
    assert not part.bias.requires_grad and "bias" in part.state_dict() and "load" not in part.state_dict()


def test_the_bias_evens_the_load(pick):
    """Tokens that all like the same experts are spread over all of them, by the bias alone; without it they are not."""
    loads = {}
    for rate in (0.01, 0.0):
        part = MoEV2(MoEV2.Config(experts=8, active=2, shared=0, rate=rate), Place(16))
        x = torch.randn(2, 64, 16) * 0.3 + torch.randn(16)
        with torch.no_grad():
            for _ in range(50):
                part(x, at(2, 64))
                part.after_step()
            part(x, at(2, 64))
        loads[rate] = (part.load.max() / part.load.mean()).item()
    assert loads[0.01] < 1.8 and loads[0.01] < 0.7 * loads[0.0], loads


def test_bias_stays_in_fp32(pick):
    decoder = models.build("moe_v2")
    part = decoder.blocks[0].ffn
    part.bias.fill_(0.1234567)
    decoder.bfloat16()
    assert part.bias.dtype == torch.float32 and part.bias[0].item() == pytest.approx(0.1234567, abs=1e-8)
    assert part.experts.wi.dtype == torch.bfloat16


def _rank(rank, port, loads, found):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = MoEV2(MoEV2.Config(experts=4, active=1, shared=0), Place(8))
    part.load.copy_(loads[rank])
    part.after_step()
    found[rank] = part.bias
    dist.destroy_process_group()


def test_the_bias_is_the_same_on_all_ranks():
    """Each rank's own counts would move its bias another way than the counts of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loads, found = torch.tensor([[9.0, 1, 1, 1], [1, 5, 9, 1]]), torch.zeros(2, 4).share_memory_()
    torch.multiprocessing.start_processes(_rank, (port, loads, found), nprocs=2, start_method="fork")
    expected = 0.001 * (loads.sum(0).mean() - loads.sum(0)).sign()
    assert torch.equal(found, expected.expand(2, -1))


def test_experts_choose_evenly_within_a_row(pick):
    """Every expert takes the same number of tokens, the best for it of its own row; other rows change nothing."""
    part = MoEV2(MoEV2.Config(experts=4, active=2, shared=0, choice="expert"), Place(16))
    x, segments_BT = torch.randn(3, 10, 16), torch.zeros(3, 10, dtype=torch.int64)
    segments_BT[2, 7:] = -1
    span = at(3, 10, segments_BT)
    y = part(x, span)[0]
    for row, tokens in ((0, 10), (2, 7)):
        scores = part.router(x[row, :tokens]).sigmoid()
        best = torch.zeros_like(scores).scatter(0, scores.topk(5, 0).indices, 1.0)
        weights = scores * best / (scores * best).sum(-1, keepdim=True).clamp(min=1e-20)
        expected = sum(weights[:, e, None] * _expert(part.experts, x[row, :tokens], e) for e in range(4))
        close(y[row, :tokens], expected)
    alone = part(x[:1], at(1, 10))[0]
    close(y[:1], alone)
    assert 0 <= span.metrics["dropped"][0] < 1
    chosen_by_tokens = part.eval()(x, span)[0]
    assert not torch.equal(chosen_by_tokens, y)
    close(chosen_by_tokens[:, :4], part.train()(x[:, :4], at(3, 4), {})[0])


def _expert(experts, x, e):
    return units(x @ experts.wi[e], experts.activation) @ experts.wo[e]


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu", "relu2"])
def test_experts_are_a_loop_over_tokens(pick, activation):
    """Against one token at a time, with choices of nobody and without, weights on either side."""
    for some, weigh_input in ((False, False), (True, False), (True, True)):
        experts = Experts(12, 8, 5, activation, 1)
        x, weights = torch.randn(17, 12), torch.rand(17, 3)
        chosen = torch.stack([torch.randperm(5 + some)[:3] for _ in range(17)])
        y = experts(x, chosen, weights, some=some, weigh_input=weigh_input)
        for token in range(17):
            expected = torch.zeros(12)
            for e, weight in zip(chosen[token].tolist(), weights[token]):
                if e < 5:
                    read = x[token] * weight if weigh_input else x[token]
                    expected = expected + _expert(experts, read, e) * (1 if weigh_input else weight)
            close(y[token], expected)


def test_soft_moe_is_its_equation(pick):
    """Each document against the equation: dispatch over its tokens, experts on slots, combine over slots."""
    part = SoftMoE(SoftMoE.Config(hidden=8, experts=3, slots=2), Place(16))
    torch.nn.init.normal_(part.scale)
    x = torch.randn(2, 14, 16)
    segments_BT = torch.tensor([[1] * 5 + [2] * 8 + [3], [0, -1, 0, 0, 1, 1, -1, 1, 1, 2, 2, -1, 2, 2]])
    y = part(x, at(2, 14, segments_BT))[0]
    for row in range(2):
        for document in set(segments_BT[row].tolist()) - {-1}:
            own = x[row, segments_BT[row] == document]
            logits = F.normalize(own, dim=-1) @ F.normalize(part.phi, dim=0) * part.scale
            slots = logits.softmax(0).T @ own
            made = torch.cat([_expert(part.experts, slots[2 * e : 2 * e + 2], e) for e in range(3)])
            close(y[row, segments_BT[row] == document], logits.softmax(1) @ made)


def test_soft_moe_drops_no_token_and_idles_no_expert(pick):
    """Every token reaches every output of its document, through every expert: taking an expert out changes all."""
    part = SoftMoE(SoftMoE.Config(experts=4), Place(16))
    x = torch.randn(1, 9, 16, requires_grad=True)
    (reach,) = torch.autograd.grad(part(x, at(1, 9))[0][0, 4].sum(), x)
    assert (reach.abs().sum(-1) > 0).all()
    whole = part(x, at(1, 9))[0]
    for expert in range(4):
        without = SoftMoE(part.config, Place(16))
        without.load_state_dict(part.state_dict())
        with torch.no_grad():
            without.experts.wo[expert] = 0
        assert ((without(x, at(1, 9))[0] - whole).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize(
    "options,word",
    [
        ("moe(active=5)", "active"),
        ("moe(experts=0)", "experts"),
        ("moe_v2(groups=3)", "groups"),
        ("moe_v2(groups=4,best_groups=1)", "active"),
        ("moe_v2(shared=0,shared_gate=True)", "shared"),
        ("switch_moe(capacity=0)", "capacity"),
        ("soft_moe(slots=0)", "slots"),
    ],
)
def test_a_mistake_gets_one_clear_line(options, word):
    with pytest.raises(ValueError, match=word) as error:
        models.build("decoder", ffn=options)
    assert "\n" not in str(error.value)


def test_statistics_are_logged():
    for name in ("moe", "moe_v2", "switch_moe"):
        _, metrics = models.build(name).train()(models.build(name).example(2))
        assert {"balance", "entropy"} <= metrics.keys() and ("dropped" in metrics) == (name == "switch_moe")


class Leaking(SoftMoE):
    """Slots of all documents of a row together."""

    def forward(self, x_BTD, at, state=None):
        return super().forward(x_BTD, replace(at, segments_BT=None), state)


def test_what_sees_ahead_is_held_to_it():
    """A causal part that says it is not, and slots that mix documents, are caught by the checks for them."""
    with pytest.raises(AssertionError):
        contract.future_is_seen(models.build("moe").eval(), 0)
    decoder = models.build("soft_moe").eval()
    contract.documents_and_padding_apart(decoder, 0)
    for block in decoder.blocks:
        block.ffn.__class__ = Leaking
    with pytest.raises(AssertionError, match="packed"):
        contract.documents_and_padding_apart(decoder, 0)


def test_only_ties_are_tried_again():
    """A check that fails is run with other seeds where scores of a router are equal, and fails at once elsewhere."""
    for size, calls in ((0.0, 4), (100.0, 1)):
        decoder, seeds = models.build("moe").eval(), []
        for block in decoder.blocks:
            block.ffn.router.weight.data *= size

        def check(decoder, seed, seeds=seeds):
            seeds.append(seed)
            decoder.logits(contract.tokens(decoder, 1, 3, 0))
            raise AssertionError("fails")

        with pytest.raises(AssertionError, match="fails"):
            contract.settled(check, decoder, 5)
        assert seeds == list(range(5, 5 + calls))


def test_decisions_are_replayed():
    """What fp32 decided is what a decoder of other weights does: only then do the two compute the same."""
    decoder, decisions = models.build("moe", layers=1).eval(), contract.Decisions()
    ids = contract.tokens(decoder, 1, 30, 0)
    with torch.no_grad(), decisions.watch(decoder):
        expected, _ = decoder.logits(ids)
        decoder.blocks[0].ffn.router.weight.mul_(-1)
        assert not torch.equal(decoder.logits(ids)[0], expected)
        decoder.blocks[0].ffn.router.weight.mul_(-1)
    other = contract.Decisions()
    with torch.no_grad(), decisions.replayed(decoder), other.watch(decoder):
        assert torch.equal(decoder.logits(ids)[0], expected)
        changed, _ = decoder.logits(ids)
    assert not torch.equal(changed, expected), "the second call replays the second decisions"
