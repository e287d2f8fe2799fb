"""Softmax attention with heads of its own, and layers of near and far attention taking turns."""

import pytest
import torch
from contract import same, tokens
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import models
from models.mixers.attention import Attention
from models.mixers.rnope_swa import RNoPESWA
from models.span import Span
from models.state import bytes_per_row
from models.stateful import Place


def test_attention_is_llamas_with_a_key_head_for_each_query_head(pick):
    heads, size, length, bias = pick.choice([1, 3, 4]), pick.choice([8, 16]), pick.choice([5, 40]), pick.random() < 0.5
    dim = heads * size
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": 3000.0},
        attn_implementation="eager",
    )
    theirs = LlamaAttention(config, 0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Attention(Attention.Config(heads, positions="rope(theta=3000)", bias=bias, out_bias=bias), Place(dim))
    with torch.no_grad():
        for kind in ("weight", "bias") if bias else ("weight",):
            parts = [getattr(getattr(theirs, f"{name}_proj"), kind) for name in "qkvo"]
            getattr(ours.wqkv, kind).copy_(torch.cat(parts[:3]))
            getattr(ours.wo, kind).copy_(parts[3])
    x = torch.randn(2, length, dim, requires_grad=True)
    at = torch.arange(length).expand(2, -1)
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    expected, _ = theirs(x, LlamaRotaryEmbedding(config)(x, at), mask)
    found, _ = ours(x, Span(at))
    same(found, expected, 1e-5)
    gradients = [
        torch.autograd.grad(y.square().sum(), [x, *part.parameters()])
        for y, part in ((found, ours), (expected, theirs))
    ]
    same(gradients[0][0], gradients[1][0], 1e-5)
    same(gradients[0][1], torch.cat(gradients[1][1:4] if not bias else gradients[1][1:7:2]), 1e-5)


def test_near_and_far_take_turns(pick):
    decoder = models.build("rnope_swa", layers=8, near=3, window=5)
    windows = [block.mixer.config.window for block in decoder.blocks]
    schemes = [block.mixer.config.positions for block in decoder.blocks]
    assert windows == [5, 5, 5, 0] * 2 and schemes == ["rope", "rope", "rope", "nope"] * 2
    grown = {length: bytes_per_row(decoder.state_spec(length), length) for length in (1000, 2000)}
    alone = models.build("gqa", layers=2)
    full = {length: bytes_per_row(alone.state_spec(length), length) for length in (1000, 2000)}
    assert grown[2000] - grown[1000] == full[2000] - full[1000]  # two of eight layers grow


def test_moving_all_places_changes_nothing(pick):
    """Near layers know distances alone, far layers nothing; so no absolute place is ever seen."""
    decoder = models.build("rnope_swa", layers=4, near=3, window=5)
    ids, at = tokens(decoder, 2, 20, 0), torch.arange(20).expand(2, -1)
    same(decoder.logits(ids, places_BTA=at + 5000)[0], decoder.logits(ids)[0], 2e-3)  # angles of 5000 in fp32


@pytest.mark.parametrize("layer,blind", [(3, True), (2, False)])
def test_a_far_layer_is_blind_to_order(pick, layer, blind):
    """The last token of a far layer reads the others in any order alike; a near one does not."""
    part = RNoPESWA(RNoPESWA.Config(window=100), Place(32, layer, 4))
    x, order = torch.randn(1, 12, 32), torch.randperm(11)
    shuffled, at = torch.cat([x[:, order], x[:, 11:]], 1), Span(torch.arange(12)[None])
    equal = torch.allclose(part(x, at)[0][:, -1], part(shuffled, at)[0][:, -1], atol=1e-5)
    assert equal == blind
