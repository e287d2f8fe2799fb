"""Depth by token: what mixtures of depths, of recursions and of expert depths promise; hybrids against Nemotron-H."""

import math
from dataclasses import replace

import contract
import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

import models
from models.config import parse_decoder
from models.decoder import Decoder
from models.layers import depth
from models.patterns.hybrid import Hybrid
from models.patterns.mixture_of_depths import MixtureOfDepths
from models.patterns.moed import MoED
from models.patterns.mor import MoR
from models.span import Span, localize

DEPTHS = ("mixture_of_depths", "mor", "moed", "hybrid")


def close(ours, theirs, tolerance=1e-5, what="output"):
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1e-3)
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def at(rows, tokens, segments_BT=None, length_B=None):
    if segments_BT is None:
        return Span(torch.arange(tokens).expand(rows, -1), length_B=length_B)
    local_BT, positions_BT = localize(segments_BT)
    return Span(positions_BT, segments_BT=local_BT, length_B=length_B)


def routed(pattern, **options):
    """A routed layer whose router reads channel 0: a token passes if that is positive, the more the better."""
    config = MixtureOfDepths.Config(vocab=0, dim=32, layers=2, pattern=pattern, **options)
    layer = MixtureOfDepths.stack(config)[1]
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(32)[:1])
        layer.router.bias.zero_()
    return layer


def test_tokens_that_are_not_chosen_pass_unchanged(pick):
    """In training a routed layer changes the top share of each row's real tokens, all others are bit-equal."""
    share, tokens = pick.choice([0.25, 0.5, 1.0]), pick.choice([8, 21])
    layer = routed("gqa", share=share)
    x, segments_BT = torch.randn(3, tokens, 32), torch.zeros(3, tokens, dtype=torch.int64)
    segments_BT[2, : tokens // 2] = -1
    for segments in (None, segments_BT):
        y, _ = layer(x, at(3, tokens, segments))
        changed = (y != x).any(-1)
        count = max(1, round(share * tokens))
        for row in range(3):
            real = torch.ones(tokens, dtype=torch.bool) if segments is None else segments[row] >= 0
            best = x[row, :, 0].masked_fill(~real, -99).argsort(descending=True)[: min(count, int(real.sum()))]
            assert changed[row, real].sum() == len(best)
            assert changed[row, best].all()


def test_a_routed_layer_in_eval_asks_each_token_alone(pick):
    layer = routed("gqa").eval()
    x = torch.randn(2, 17, 32)
    y, _ = layer(x, at(2, 17))
    assert torch.equal((y != x).any(-1), x[..., 0] > 0)


@pytest.mark.parametrize("pattern", ["gqa", "gated_deltanet"])
def test_chosen_tokens_are_a_sequence_of_their_own(pick, pattern):
    """Brought together or with the others as padding: the same outputs; positions are those of the whole document."""
    layer = routed(pattern).eval()
    x, segments_BT = torch.randn(2, 24, 32), contract.documents(2, 24, pick.randrange(1 << 30))
    passing_BT = torch.rand(2, 24) < 0.5
    passing_BT[:, 3] = True
    for segments in (None, segments_BT):
        span = at(2, 24, segments)
        masked, _ = depth.one_by_one(layer.block, x, span, None, passing_BT)
        for row in range(2):
            chosen = passing_BT[row] if segments is None else passing_BT[row] & (segments[row] >= 0)
            index_Bk = chosen.nonzero().T
            one = replace(
                span,
                positions_BT=span.positions_BT[row : row + 1],
                segments_BT=None if segments is None else span.segments_BT[row : row + 1],
            )
            y = depth.together(layer.block, x[row : row + 1], one, index_Bk)
            close(y[0], masked[row, chosen])
            if pattern == "gqa":
                nearer = replace(one, places_BTA=torch.zeros_like(one.positions_BT))
                elsewhere = depth.together(layer.block, x[row : row + 1], nearer, index_Bk)
                assert (elsewhere - y).abs().max() > 1e-5, "places do not reach the block"


def test_the_cache_holds_what_passed_and_nothing_else(pick):
    decoder = models.build("mixture_of_depths").eval()
    ids = contract.tokens(decoder, 3, 20, 1)
    with torch.no_grad():
        _, state = decoder.logits(ids, decoder.init_state(3, 20))
        x, _ = decoder.blocks[0](decoder.embed(ids), at(3, 20))
        passing = decoder.blocks[1].router(x)[..., 0] > 0
    assert torch.equal(state["1.length"], passing.sum(1)) and (passing.sum(1) < 20).any()
    written = state["1.mixer.k"].abs().sum((2, 3)) > 0
    assert torch.equal(written, torch.arange(20) < state["1.length"][:, None])
    assert (state["0.mixer.k"].abs().sum((2, 3)) > 0).all()


@pytest.mark.parametrize("pattern", ["gqa", "gated_deltanet", "lstm"])
def test_a_document_that_nothing_passed_yet_is_fresh(pick, pattern):
    """Its first tokens pass by, in a call of their own; what passes later must not see the document before."""
    layer = routed(pattern).eval()
    x = torch.randn(1, 9, 32)
    x[..., 0] = torch.tensor([1.0, 1, 1, -1, -1, 1, -1, 1, 1])
    spec = layer.state_spec(20)
    fresh = {name: tensor.empty(1, 20) for name, tensor in spec.items()}
    with torch.no_grad():
        _, state = layer(x[:, :3], at(1, 3, length_B=torch.tensor([0])), fresh)
        begun = Span(torch.tensor([[3, 0]]), segments_BT=torch.tensor([[0, 1]]), length_B=torch.tensor([3]))
        assert state["length"].item() == 3
        _, state = layer(x[:, 3:5], begun, state)
        assert state["length"].item() == 0
        later = Span(torch.arange(1, 5)[None], length_B=torch.tensor([1]))
        y, _ = layer(x[:, 5:], later, state)
        alone, _ = layer(x[:, 4:], at(1, 5))
    close(y, alone[:, 1:])


def test_the_auxiliary_loss_teaches_a_router_to_decide_alone(pick):
    """Top of the row in training, above zero alone: with the loss the two come to agree, without it they do not."""
    found = {}
    for auxiliary in (1.0, 0.0):
        layer = routed("gqa", share=0.25, auxiliary=auxiliary)
        x = torch.randn(4, 32, 32)
        optimizer = torch.optim.Adam(layer.router.parameters(), 0.05)
        for _ in range(40):
            span = at(4, 32)
            layer(x, span)
            optimizer.zero_grad()
            span.losses[0].backward()
            optimizer.step()
        found[auxiliary] = span.metrics["foretold"][0].item()
    assert found[1.0] > 0.85 > found[0.0], found


def sets(decoder, x, span):
    """What each recursion of a training pass chose: (B, T) bool for each."""
    decisions = contract.Decisions()
    with decisions.watch(decoder):
        y, _ = decoder.blocks[1](x, span)
    return y, [torch.zeros(x.shape[:2]).scatter(1, chosen, 1).bool() for _, _, chosen in decisions.made]


def test_recursions_are_nested_and_shared(pick):
    """Each recursion takes its share of the tokens of the one before, and all are the same weights."""
    steps, tokens = pick.choice([3, 4]), pick.choice([12, 19])
    decoder = models.build("mor", steps=steps, layers=4)
    x = torch.randn(2, tokens, 64)
    y, active = sets(decoder, x, at(2, tokens))
    assert len(active) == steps
    for step, chosen in enumerate(active):
        assert (chosen.sum(1) == math.ceil(tokens * (steps - step) / steps)).all()
        assert not step or not (chosen & ~active[step - 1]).any()
    recursion = decoder.blocks[1]
    expected = x
    for chosen, router in zip(active, recursion.routers):
        weight = 0.5 * router(expected).sigmoid()
        for row in range(2):
            own = chosen[row].nonzero().T
            some = Span(torch.arange(own.shape[1])[None], places_BTA=own)
            inner = recursion.shared(expected[row : row + 1, chosen[row]], some)[0]
            now = expected.clone()
            now[row, chosen[row]] = expected[row, chosen[row]] + weight[row, chosen[row]] * inner[0]
            expected = now
    close(y, expected)
    count = {n: sum(p.numel() for p in models.build("mor", steps=n).parameters()) for n in (1, 5)}
    assert count[5] - count[1] == 4 * (64 + 1)


def test_one_recursion_of_all_tokens_is_a_weighted_block(pick):
    decoder = models.build("mor", steps=1)
    x = torch.randn(2, 9, 64)
    y, _ = decoder.blocks[1](x, at(2, 9))
    inner, _ = decoder.blocks[1].shared(x, at(2, 9))
    close(y, x + 0.5 * decoder.blocks[1].routers[0](x).sigmoid() * inner)


def test_a_token_that_left_is_never_touched_again(pick):
    """Deeper recursions, and their caches, see fewer tokens; those that left stay bit-equal."""
    decoder = models.build("mor", steps=3).eval()
    recursion, x = decoder.blocks[1], torch.randn(2, 30, 64)
    state = {name: tensor.empty(2, 30) for name, tensor in recursion.state_spec(30).items()}
    with torch.no_grad():
        y, after = recursion(x, at(2, 30, length_B=torch.zeros(2, dtype=torch.int64)), state)
        lengths = [after[f"{step}.length"] for step in range(3)]
        assert (lengths[0] == 30).all() and (lengths[0] > lengths[1]).all() and (lengths[1] >= lengths[2]).all()
        for step in range(3):
            written = after[f"{step}.0.mixer.k"].abs().sum((2, 3)) > 0
            assert torch.equal(written, torch.arange(30) < lengths[step][:, None])
        for router in list(recursion.routers)[1:]:
            router.bias.fill_(-99)  # nobody goes deeper
        once, _ = recursion(x, at(2, 30))
    stayed = (y == once).all(-1)
    assert torch.equal(stayed.sum(1), 30 - lengths[1])


def test_a_token_picks_how_deep_it_goes(pick):
    """Each token against the layers of its own expert; one that picks depth 0 stays bit-equal and meets no expert."""
    deepest = pick.choice([1, 2, 3])
    part = MoED.stack(MoED.Config(vocab=0, dim=32, layers=1, deepest=deepest))[0].depths
    for norm in part.norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(2, 40, 32)
    y, _ = part(x, at(2, 40))
    scores = part.router(x).softmax(-1)
    chosen = scores.argmax(-1)
    assert len(chosen.unique()) == deepest + 1
    for row in range(2):
        for token in range(40):
            d, u, total = int(chosen[row, token]), x[row, token], torch.zeros(32)
            for level in range(d):
                experts, inner = part.levels[level], part.norms[level - 1](u + total) if level else u
                gate, up = (inner @ experts.wi[d - 1 - level]).chunk(2)
                total = total + (torch.nn.functional.silu(gate) * up) @ experts.wo[d - 1 - level]
            close(y[row, token], scores[row, token, d] * total)
    with torch.no_grad():
        for experts in part.levels:
            experts.wi.fill_(float("nan"))
    y, _ = part(x, at(2, 40))
    assert torch.equal(y.isnan().any(-1), chosen > 0) and not y[chosen == 0].any()


def test_hybrid_is_nemotron_h(pick):
    """Mamba-2, attention, a squared-ReLU layer and a mixture of experts, each a layer of its own, weights copied."""
    dim, heads, state, experts, tokens = 32, 4, 16, 6, pick.choice([5, 21])
    kinds = ["mamba", "mlp", "attention", "moe", "mamba", "mamba"]
    pick.shuffle(kinds)
    names = {"mamba": "linear_attention", "attention": "full_attention"}
    theirs = NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=61,
            hidden_size=dim,
            layers_block_type=[names.get(kind, kind) for kind in kinds],
            num_attention_heads=heads,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            ssm_state_size=state,
            mamba_num_heads=heads,
            mamba_head_dim=16,
            n_groups=1,
            conv_kernel=4,
            chunk_size=8,
            n_routed_experts=experts,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=40,
            num_experts_per_tok=2,
            use_mamba_kernels=False,
        )
    ).eval()
    mixers = {"mamba": f"mamba_ssd(heads={heads},head_dim=16,state={state})"}
    mixers["attention"] = f"gqa(heads={heads},kv_heads=2,head_dim=8,positions=nope)"
    ffns = {"mlp": "channel_mix(hidden=48)"}
    ffns["moe"] = f"moe_v2(hidden=24,experts={experts},shared=40,activation=relu2)"
    pattern, ffn = (" ".join(parts.get(kind, "none") for kind in kinds) for parts in (mixers, ffns))
    ours = Hybrid(Hybrid.Config(61, dim, len(kinds), pattern, ffn, eps=1e-5)).eval()
    mapped = {"embedding.weight": "model.embeddings", "norm.weight": "model.norm_f", "head.weight": "lm_head"}
    weights, given = theirs.state_dict(), {}
    for name, source in mapped.items():
        given[name] = weights[f"{source}.weight"]
    for layer, kind in enumerate(kinds):
        source = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        for name, value in source.items():
            if value.dim() == 1 and not name.endswith("norm.weight"):
                torch.nn.init.uniform_(value, -1, 1)  # decays, steps and biases start alike in all heads
        part = {"mamba": "mixer", "attention": "mixer"}.get(kind, "ffn")
        given |= {f"blocks.{layer}.{name}": value for name, value in _renamed(kind, part, source).items()}
    own = ours.state_dict()
    assert given.keys() == own.keys() - {name for name in own if name.endswith("ffn.mix")}
    ours.load_state_dict(
        {name: given[name].view(value.shape) if name in given else value * 0 for name, value in own.items()}
    )
    ids = torch.randint(61, (2, tokens))
    expected = theirs(ids).logits
    logits, _ = ours.logits(ids)
    close(logits, expected)
    steps, _ = contract.in_chunks(ours, ids, range(1, tokens), ours.init_state(2, tokens))
    close(steps, expected, 1e-4)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((logits * weight).sum(), ours.embedding.weight)[0]
    close(found, torch.autograd.grad((expected * weight).sum(), theirs.model.embeddings.weight)[0], 1e-4)


def _renamed(kind, part, source):
    """Nemotron-H's names of one layer in ours; the first tap of a convolution is the oldest in both."""
    found = {f"{part}_norm.weight": source["norm.weight"]}
    renames = {
        "mamba": {
            "wi.weight": "in_proj.weight",
            "conv": "conv1d.weight",
            "conv_bias": "conv1d.bias",
            "log_decay": "A_log",
            "step_bias": "dt_bias",
            "skip": "D",
            "norm.weight": "norm.weight",
            "wo.weight": "out_proj.weight",
        },
        "attention": {"wo.weight": "o_proj.weight"},
        "mlp": {"wi.weight": "up_proj.weight", "wo.weight": "down_proj.weight"},
        "moe": {
            "router.weight": "gate.weight",
            "bias": "gate.e_score_correction_bias",
            "shared.wi.weight": "shared_experts.up_proj.weight",
            "shared.wo.weight": "shared_experts.down_proj.weight",
        },
    }
    found |= {f"{part}.{name}": source[f"mixer.{theirs}"] for name, theirs in renames[kind].items()}
    if kind == "attention":
        qkv = [source[f"mixer.{name}_proj.weight"] for name in "qkv"]
        found[f"{part}.wqkv.weight"] = torch.cat(qkv)
    if kind == "moe":
        found[f"{part}.experts.wi"] = source["mixer.experts.up_proj"].mT
        found[f"{part}.experts.wo"] = source["mixer.experts.down_proj"].mT
    return found


def test_hybrid_has_the_ratio_it_says():
    kinds = [type(block.mixer).__name__ for block in Hybrid.stack(Hybrid.Config(dim=64))]
    assert kinds.count("MambaSSD") == 11 and kinds.count("GQA") == 1
    named = models.build("hybrid", pattern="2*lstm sliding_window none", ffn="3*swiglu moe", layers=8)
    assert [len(block.branches) for block in named.blocks] == [2, 2, 2, 1] * 2


@pytest.mark.parametrize("name", DEPTHS)
def test_layers_serve_a_policy(name):
    """What rl takes: the layers alone, mixers bounded, step by step with their own state."""
    cls, _ = parse_decoder(name)
    config = replace(cls.Config.tiny(), pattern="gqa", vocab=0)
    layers = cls.stack(config, adapt=lambda mixer: replace(mixer, window=5))
    assert layers.causal
    x, state = torch.randn(2, 12, config.dim), {n: t.empty(2, 5) for n, t in layers.state_spec(5).items()}
    with torch.no_grad():
        whole, _ = layers.eval()(x, at(2, 12))
        for t in range(12):
            span = Span(torch.full((2, 1), t), length_B=torch.full((2,), t))
            y, state = layers(x[:, t : t + 1], span, state)
            close(y, whole[:, t : t + 1], 1e-4)


@pytest.mark.parametrize("name", (*DEPTHS, "moe_v2"))
def test_a_second_run_of_a_block_decides_as_the_first(name):
    """Activation checkpointing: the same loss and gradients, auxiliary losses with them."""
    decoder = models.build(name).train()
    batch, found = decoder.example(2, 1), []
    for recompute in (False, True):
        decoder.zero_grad()
        decoder.blocks.recompute = recompute
        total, _ = decoder(batch)
        total.backward()
        found.append([total, *(p.grad for p in decoder.parameters() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        close(two, one)


@pytest.mark.parametrize(
    "name,options,word",
    [
        ("mixture_of_depths", {"share": 0.0}, "share"),
        ("mixture_of_depths", {"share": 1.5}, "share"),
        ("mixture_of_depths", {"every": 3}, "every"),
        ("mixture_of_depths", {"block": "mhc"}, "streams"),
        ("mor", {"layers": 2}, "layers"),
        ("mor", {"steps": 0}, "steps"),
        ("moed", {"deepest": 0}, "deepest"),
        ("decoder", {"block": "mhc norm_placement"}, "streams"),
    ],
)
def test_a_mistake_gets_one_clear_line(name, options, word):
    with pytest.raises(ValueError, match=word) as error:
        models.build(name, **options)
    assert "\n" not in str(error.value)


def test_patterns_are_decoders():
    for cls in (MixtureOfDepths, MoR, MoED, Hybrid):
        assert issubclass(cls, Decoder) and cls.family
