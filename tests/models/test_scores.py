"""What becomes of scores: each scheme against a plain oracle, and the property it exists for."""

import math

import pytest
import torch
from contract import same, tokens
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

import kernels
import models
from kernels import View
from models.layers.dense import weighted
from models.mixers.gqa import GQA
from models.positions.alibi import slopes
from models.span import Span
from models.stateful import Place


def view_of(pick, paged=False):
    """A call of 7 tokens on a past of 12 slots, of which one row fills some, with documents and padding."""
    heads, groups, size = pick.choice([(4, 2), (3, 1), (6, 3)]) + (8,)
    new = {name: torch.randn(2, 7, groups, size, requires_grad=True) for name in "kv"}
    past = {name: torch.randn(2, 12, groups, size) for name in "kv"}
    segments = torch.tensor([[0, 0, -1, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]])
    positions = torch.tensor([[5, 6, 6, 7, 0, 1, 0], list(range(9, 16))])
    table = None
    if paged:
        past = {
            name: torch.cat([torch.full_like(x[:1, :4], torch.nan), x.reshape(6, 4, groups, size)])
            for name, x in past.items()
        }
        table = torch.arange(1, 7).view(2, 3)
    return torch.randn(2, 7, heads, size), View(new, past, torch.tensor([5, 9]), positions, segments, table)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_written_out_attention_is_attention(pick, paged, window, mask):
    q, view = view_of(pick, paged)
    slopes_H = torch.rand(q.shape[2])
    options = {"window": window, "mask": mask, "slopes_H": slopes_H, "scale": 0.3}
    ours, fused = weighted(q, view, lambda x: x.softmax(-1), **options), kernels.attention(q, view, **options)
    torch.testing.assert_close(ours, fused, rtol=1e-4, atol=1e-5)
    mine, theirs = (torch.autograd.grad(y.square().sum(), view.new["k"], retain_graph=True)[0] for y in (ours, fused))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def layer(**options):
    return GQA(GQA.Config(heads=2, kv_heads=1, positions="nope", **options), Place(16))


def weights_of(part, x_BTD):
    """The weights a layer gives, (B, H, T, T): values are one-hot, so its output before W_o is its weights."""
    at = Span(torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2]))
    q, k, _ = part.project(x_BTD, at)
    tokens = x_BTD.shape[1]
    one_hot = torch.eye(tokens)[None, :, None].expand(len(x_BTD), -1, 1, -1)
    return part.attend(q, View({"k": k, "v": one_hot}, {})).transpose(1, 2), q, k


def scores_of(q, k):
    scores = torch.einsum("bthk,bsgk->bhts", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)


def test_softpick_rows_may_sum_below_one_and_hold_zeros(pick):
    found, q, k = weights_of(layer(scores="softpick"), torch.randn(2, 9, 16))
    scores = scores_of(q, k)
    grown = torch.where(scores.isfinite(), scores.exp() - 1, 0)
    expected = grown.relu() / grown.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (found[scores <= 0] == 0).all() and (found.sum(-1) <= 1 + 1e-6).all() and (found.sum(-1) < 0.99).any()


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_entmax_is_a_projection_with_exact_zeros(pick, alpha):
    """Against bisection for the threshold; sparsemax against its closed form by sorting."""
    found, q, k = weights_of(layer(scores=f"entmax(alpha={alpha})"), 2 * torch.randn(2, 9, 16))
    scores = scores_of(q.double(), k.double()) * (alpha - 1)
    low, high = scores.amax(-1, keepdim=True) - 1, scores.amax(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        total = (scores - middle).relu().pow(1 / (alpha - 1)).sum(-1, keepdim=True)
        low, high = torch.where(total > 1, middle, low), torch.where(total > 1, high, middle)
    torch.testing.assert_close(found.double(), (scores - low).relu().pow(1 / (alpha - 1)), rtol=1e-3, atol=1e-5)
    causal_zeros = (found == 0) & scores.isfinite()
    assert causal_zeros.any() and torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)
    if alpha == 2:
        rows = scores[..., -1, :].sort(-1, descending=True).values
        ranks = torch.arange(1, rows.shape[-1] + 1)
        support = (1 + ranks * rows > rows.cumsum(-1)).sum(-1, keepdim=True)
        threshold = (rows.cumsum(-1).gather(-1, support - 1) - 1) / support
        torch.testing.assert_close(
            found[..., -1, :].double(), (scores[..., -1, :] - threshold).relu(), rtol=1e-3, atol=1e-5
        )


def test_scalable_softmax_does_not_flatten(pick):
    """A key that stands out by one keeps its weight as the document grows; under a softmax it fades."""
    kept = {}
    for scores in ("softmax", "ssmax(length=32)"):
        part = layer(scores=scores)
        kept[scores] = []
        for length in (32, 512):
            q = torch.zeros(1, length, 2, 8)
            q[..., 0] = 8**0.5
            k = torch.zeros(1, length, 1, 8)
            k[:, 3, :, 0] = 4.0
            value = torch.zeros(1, length, 1, 1)
            value[:, 3] = 1.0
            kept[scores].append(part.attend(q, View({"k": k, "v": value}, {}))[0, -1, 0, 0].item())
    assert kept["softmax"][1] < 0.2 * kept["softmax"][0]
    assert kept["ssmax(length=32)"][1] > kept["ssmax(length=32)"][0]


def test_scalable_softmax_is_a_softmax_of_scores_times_log_n(pick):
    part = layer(scores="ssmax(length=5)")
    torch.nn.init.uniform_(part.scores.s_H, 0.5, 2)
    found, q, k = weights_of(part, torch.randn(2, 9, 16))
    mean = sum(math.log(n) for n in range(1, 6)) / 5
    scale = part.scores.s_H[:, None] * torch.arange(1, 10).log() / mean
    scores = (scores_of(q, k).nan_to_num(neginf=0) * scale[..., None]).masked_fill(scores_of(q, k).isinf(), -torch.inf)
    same(found, scores.softmax(-1), 1e-5)


def test_soft_cap_and_sinks(pick):
    part = layer(scores="softmax(softcap=0.5,sinks=True)")
    torch.nn.init.normal_(part.scores.sinks_H)
    found, q, k = weights_of(part, 3 * torch.randn(2, 9, 16))
    capped = 0.5 * (scores_of(q, k) / 0.5).tanh()
    capped = capped.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    sink = part.scores.sinks_H[:, None, None].expand(2, 2, 9, 1)
    torch.testing.assert_close(found, torch.cat([capped, sink], -1).softmax(-1)[..., :9], rtol=1e-4, atol=1e-6)


def test_alibi_is_bloom(pick):
    """A layer of Bloom with its random weights: the same outputs and gradients, for any number of heads."""
    heads, length = pick.choice([2, 4, 5, 6, 8, 12]), pick.choice([5, 19])
    dim = heads * 8
    theirs = BloomAttention(BloomConfig(hidden_size=dim, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0), 0)
    ours = GQA(GQA.Config(heads, heads, positions="alibi", bias=True, out_bias=True), Place(dim))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        per_head = {name: p.unflatten(0, (heads, 3, 8)) for name, p in theirs.query_key_value.named_parameters()}
        for name, p in per_head.items():
            getattr(ours.wqkv, name).copy_(p.transpose(0, 1).flatten(0, 2))
        ours.wo.load_state_dict(theirs.dense.state_dict())
    alibi = build_alibi_tensor(torch.ones(2, length), heads, torch.float32)
    assert torch.allclose(
        torch.tensor(slopes(heads)), alibi.view(2, heads, length)[0, :, 1] - alibi.view(2, heads, length)[0, :, 0]
    )
    x = torch.randn(2, length, dim, requires_grad=True)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected = theirs(x, torch.zeros_like(x), alibi, mask)[0]
    found, _ = ours(x, Span(torch.arange(length).expand(2, -1)))
    same(found, expected, 1e-5)
    mine, others = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    same(mine, others, 2e-5)


def test_rope_scores_depend_on_the_distance_alone(pick):
    decoder = models.build("gqa", positions="rope")
    mixer, x = decoder.blocks[0].mixer, torch.randn(1, 9, 64)
    near = Span(torch.arange(9)[None])
    far = Span(torch.arange(9)[None], places_BTA=torch.arange(9)[None] + 1000)
    torch.testing.assert_close(mixer(x, near)[0], mixer(x, far)[0], rtol=1e-3, atol=1e-4)
    spread = Span(torch.arange(9)[None], places_BTA=3 * torch.arange(9)[None])
    assert not torch.allclose(mixer(x, near)[0], mixer(x, spread)[0], atol=1e-3)


def test_places_reach_the_positions(pick):
    decoder = models.build("gqa")
    ids = tokens(decoder, 2, 9, 0)
    places = torch.arange(9).expand(2, -1)
    assert torch.equal(decoder.logits(ids)[0], decoder.logits(ids, places_BTA=places)[0])
    assert not torch.allclose(decoder.logits(ids)[0], decoder.logits(ids, places_BTA=places * 2)[0], atol=1e-3)
    with pytest.raises(ValueError, match="one axis"):
        decoder.logits(ids, places_BTA=places[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize(
    "scheme,name",
    [
        ("yarn(factor=0)", "yarn.factor"),
        ("yarn(theta=1)", "yarn.theta"),
        ("yarn(original=0)", "yarn.original"),
        ("yarn(slow=0)", "yarn.slow"),
        ("llama3_rope(factor=0)", "llama3_rope.factor"),
        ("llama3_rope(low=4)", "llama3_rope.low"),
        ("dynamic_ntk(original=0)", "dynamic_ntk.original"),
        ("longrope(short=[0.0])", "longrope.short"),
        ("rope(fraction=1e308)", "positions"),
    ],
)
def test_frequencies_that_are_no_numbers_are_refused(scheme, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        models.build("gqa", positions=scheme)


def test_latent_attention_refuses_a_scheme_that_scales_queries():
    with pytest.raises(ValueError, match="mla.positions"):
        models.build("mla", positions="irope")
