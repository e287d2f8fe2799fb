"""Parts that checkpoints brought along: what each of them does, and fails to do without its idea."""

import pytest
import torch
import torch.nn.functional as F
from contract import same
from transformers.activations import ACT2FN

import models
from models.span import Span
from models.stateful import Place


def at(rows, tokens, first=0):
    return Span(torch.arange(first, first + tokens).expand(rows, -1))


def test_irope_turns_some_layers_and_sharpens_the_others(pick):
    every, floor, heads = pick.choice([2, 3, 4]), pick.choice([2, 5]), pick.choice([1, 3])
    options = f"irope(every={every},floor={floor},sharpness=0.3,positions=rope(theta=100))"
    cls, config = models.config.parse_part(options, "position")
    rope, rope_config = models.config.parse_part("rope(theta=100)", "position")
    q, span = torch.randn(2, 40, heads, 8), at(2, 40, pick.choice([0, 17]))
    for layer in range(6):
        place = Place(32, layer, 6)
        scheme = cls(config, 8, heads, place)
        if (layer + 1) % every:
            turned = rope(rope_config, 8, heads, place)
            assert torch.equal(scheme.query(q, span), turned.query(q, span))
            assert torch.equal(scheme.key(q, span), turned.key(q, span))
            continue
        assert torch.equal(scheme.key(q, span), q)
        ratio = scheme.query(q, span) / q
        for t, position in enumerate(span.positions_BT[0].tolist()):
            expected = 1 + 0.3 * torch.tensor(1.0 + (position + 1) // floor).log()
            torch.testing.assert_close(ratio[:, t], expected.expand_as(ratio[:, t]), rtol=1e-5, atol=1e-5)


def test_chunked_attention_is_full_attention_of_each_chunk(pick):
    chunk, tokens = pick.choice([1, 3, 8]), pick.choice([5, 23])
    chunked = models.build("chunked_attention", chunk=chunk, positions="nope", layers=1).eval()
    full = models.build("gqa", positions="nope", layers=1).eval()
    full.load_state_dict(chunked.state_dict())
    ids = torch.randint(64, (2, tokens))
    expected = torch.cat([full.logits(piece)[0] for piece in ids.split(chunk, 1)], 1)
    torch.testing.assert_close(chunked.logits(ids)[0], expected, rtol=1e-4, atol=1e-5)
    state = chunked.init_state(2, tokens)
    for t in range(tokens):
        logits, state = chunked.logits(ids[:, t : t + 1], state)
        torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=1e-4, atol=1e-5)


def test_chunks_are_of_documents_and_keep_their_positions(pick):
    """Each document is cut from its own beginning, and turned by its own positions."""
    model = models.build("chunked_attention", chunk=pick.choice([3, 5]), layers=2).eval()
    lengths = [pick.randint(1, 12) for _ in range(3)]
    documents = [torch.randint(64, (1, length)) for length in lengths]
    segments = torch.cat([torch.full((1, length), i) for i, length in enumerate(lengths)], 1)
    packed, _ = model.logits(torch.cat(documents, 1), None, segments)
    expected = torch.cat([model.logits(document)[0] for document in documents], 1)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
    longer, other = torch.cat(documents, 1), torch.cat(documents, 1)
    chunk = model.blocks[0].mixer.config.chunk
    other[:, :chunk] = (other[:, :chunk] + 1) % 64
    same = torch.isclose(model.logits(longer)[0], model.logits(other)[0], atol=1e-6).all(-1)[0]
    assert not same[:chunk].any() and same[chunk:].all()


def test_a_chunk_in_the_cache_is_no_longer_than_a_chunk():
    spec = models.build("chunked_attention", chunk=16).state_spec(100_000)
    assert spec["0.mixer.k"].capacity(100_000) < 100


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_activations_of_gates(pick, name):
    ffn = models.build("swiglu", activation=name, layers=1).blocks[0].ffn
    x = torch.randn(2, 5, 64)
    gate, up = ffn.wi(x).chunk(2, -1)
    theirs = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)]
    torch.testing.assert_close(ffn(x, at(2, 5))[0], ffn.wo(theirs(gate) * up))


def test_norm_of_hidden_units(pick):
    ffn = models.build("swiglu", hidden_norm=True, layers=1).blocks[0].ffn
    x = torch.randn(2, 5, 64)
    gate, up = ffn.wi(x).chunk(2, -1)
    expected = ffn.wo(F.rms_norm(F.silu(gate) * up, (up.shape[-1],), eps=1e-6))
    torch.testing.assert_close(ffn(x, at(2, 5))[0], expected)


def test_squared_relu(pick):
    ffn = models.build("squared_relu", bias=True, layers=1).blocks[0].ffn
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(ffn(x, at(2, 5))[0], ffn.wo(ACT2FN["relu2"](ffn.wi(x))))


def test_the_loss_of_a_head_is_that_of_its_logits(pick):
    """Scale and softcap are in both, and in the gradients."""
    head = models.build("lm", logit_scale=pick.uniform(0.2, 3), softcap=pick.choice([0.0, 0.7]), layers=1).head
    torch.nn.init.normal_(head.weight)
    x, targets = torch.randn(2, 7, 64), torch.randint(64, (2, 7))
    targets[0, 3] = -100
    one, two = (x.clone().requires_grad_() for _ in range(2))
    losses, _ = head(one, at(2, 7), targets_BT=targets)
    logits, _ = head(two, at(2, 7))
    bare = x @ head.weight.T * head.config.logit_scale
    cap = head.config.softcap
    same(logits, cap * (bare / cap).tanh() if cap else bare, 1e-5)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-4, atol=1e-5)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
