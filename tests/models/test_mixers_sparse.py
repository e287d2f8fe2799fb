"""Sparse and long attention: definitions by loops, fla's naive NSA, and what each idea promises."""

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from fla.ops.nsa.naive import naive_nsa_compression, naive_nsa_selection, naive_nsa_topk
from torch import nn

import models
from kernels import View
from models.layers.choice import Choice
from models.layers.compressed import Blocks, level
from models.layers.compressed import pick as chosen
from models.layers.merged import merged_attention, written_out
from models.mixers.dual_chunk_attention import DualChunkAttention
from models.mixers.gqa import GQA
from models.mixers.infllm_v2 import InfLLMV2
from models.mixers.mixture_of_attentions import MixtureOfAttentions
from models.mixers.nsa import NSA
from models.mixers.ring_attention import join
from models.mixers.spla import SPLA, moments_of
from models.span import Span, localize
from models.stateful import Place


def close(ours, theirs, tolerance=1e-5):
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
    assert error < tolerance, f"relative error {error:.2e}"


def span(rows, tokens):
    return Span(torch.arange(tokens).expand(rows, tokens))


def same_gradients(ours, theirs, leaves, tolerance=1e-5):
    """Outputs and the gradients of leaves, under one random weighting."""
    close(ours, theirs, tolerance)
    weight = torch.randn_like(theirs)
    found, expected = (torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        close(one, other, tolerance)


def drawn(pick):
    """heads, kv_heads, head_dim, dim."""
    kv_heads, group = pick.choice([1, 2, 3]), pick.choice([2, 3, 4])  # a group of one would hide who chooses
    return kv_heads * group, kv_heads, pick.choice([4, 8]), pick.choice([20, 33])


def masked(q_BTHK, k_BTGK, v_BTGK, sees_BTGS):
    """Softmax attention under a mask by key-value head; 0 where nothing is seen."""
    group = q_BTHK.shape[2] // k_BTGK.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k_BTGK, v_BTGK))
    sees = sees_BTGS.repeat_interleave(group, 2)
    logits = torch.einsum("bthk,bshk->bths", q_BTHK, k) * q_BTHK.shape[3] ** -0.5
    weights = logits.masked_fill(~sees, -1e30).softmax(-1) * sees
    return torch.einsum("bths,bshk->bthk", weights, v)


def means_of(k_TGK, size, stride):
    return [k_TGK[start : start + size].mean(0) for start in range(0, len(k_TGK) - size + 1, stride)]


# -- blocks as single entries ----------------------------------------------------------------------------------------


def test_completed_blocks(pick):
    """Of random documents with padding, cut at random: each block is complete once, at its last token."""
    size, stride = (6, 2) if pick.random() < 0.5 else (5, 5)
    blocks, ids = Blocks(size, stride), (torch.rand(3, 40) < 0.07).long().cumsum(1)
    ids = torch.where(torch.rand(3, 40) < 0.2, -1, ids)
    length, segment, found, expected = torch.zeros(3).long(), torch.zeros(3).long(), [], []
    start = 0
    while start < 40:
        end = min(40, start + pick.randint(1, 12))
        local, positions = localize(ids[:, start:end], length, segment)
        at = Span(positions, segments_BT=local, length_B=length)
        made, column = blocks.completed(at)
        for row in range(3):
            for number, where, inside in zip(made.positions_BT[row], column[row], made.segments_BT[row], strict=True):
                if inside >= 0:
                    assert inside == local[row, where]
                    found.append((row, start + int(where), int(number)))
            for column_ in range(end - start):
                if local[row, column_] >= 0:
                    length[row], segment[row] = positions[row, column_] + 1, ids[row, start + column_]
                    if (length[row] - size) >= 0 and (length[row] - size) % stride == 0:
                        expected.append((row, start + column_, int(length[row] - size) // stride))
        assert blocks.count(length).tolist() == [max(0, (n - size) // stride + 1) for n in length.tolist()]
        start = end
    assert sorted(found) == sorted(expected)


# -- InfLLM-V2 -------------------------------------------------------------------------------------------------------


def test_rounding_does_not_choose_among_equal_blocks():
    """A text of a few phrases that come again and again: whatever the last bits of its scores, the same are read."""
    at, count = span(2, 60), 15
    phrases = torch.randint(4, (2, 1, 3, count))
    scores = (torch.rand(2, 1, 3, 4) + 0.5).gather(3, phrases).expand(2, 60, 3, count)
    options = {"block": 4, "initial": 1, "local": 2, "count": 5}
    want = chosen(Choice(), scores, at, **options)
    kept = set()
    for draw in range(5):
        noisy = scores * (1 + 1e-6 * torch.rand(scores.shape, generator=torch.Generator().manual_seed(draw)))
        assert torch.equal(chosen(Choice(), noisy, at, **options), want)
        kept.add(torch.equal(torch.sort(noisy, dim=-1, stable=True)[1], torch.sort(scores, dim=-1, stable=True)[1]))
    assert kept == {False}  # the noise does change the order
    assert torch.equal(level(scores * 1.5), scores * 1.5)  # and what differs stays as it is
    assert level(scores[..., :0]).shape == (2, 60, 3, 0)


def infllm_mask(mixer, q_BTHK, k_BTGK):
    """Which keys a token reads, (B, T, G, S), by loops."""
    c = mixer.options
    rows, tokens, heads, size = q_BTHK.shape
    groups = k_BTGK.shape[2]
    sees = torch.zeros(rows, tokens, groups, tokens, dtype=torch.bool)
    for b in range(rows):
        means = means_of(k_BTGK[b], c.kernel, c.stride)
        for t in range(tokens):
            here = t // c.block
            for g in range(groups):
                known = [m[g] for i, m in enumerate(means) if i * c.stride + c.kernel - 1 <= t]
                shared = torch.zeros(0)
                if known:
                    q = q_BTHK[b, t, g * heads // groups : (g + 1) * heads // groups]
                    shared = (q @ torch.stack(known).T * size**-0.5).softmax(-1).sum(0)
                score = {}
                for j in range(c.initial, here - c.local + 1):
                    touching = [
                        s.item()
                        for i, s in enumerate(shared)
                        if i * c.stride < (j + 1) * c.block and i * c.stride + c.kernel > j * c.block
                    ]
                    score[j] = max(touching)
                best = sorted(score, key=lambda j: (-score[j], j))[: c.selected]
                read = {*range(c.initial), *range(here - c.local + 1, here + 1), *best}
                for s in range(t + 1):
                    sees[b, t, g, s] = t < c.dense or s // c.block in read
    return sees


@pytest.mark.parametrize("dense", [0, 17])
def test_infllm_is_attention_under_its_mask(pick, dense):
    heads, kv_heads, head_dim, dim = drawn(pick)
    block, stride = pick.choice([(4, 2), (6, 3), (4, 4)])
    own = {"block": block, "stride": stride, "kernel": stride * pick.choice([1, 2]), "initial": pick.choice([0, 1])}
    own |= {"local": pick.choice([1, 2]), "selected": 1, "dense": dense}
    mixer = InfLLMV2(InfLLMV2.Config(heads, kv_heads, head_dim, qk_norm=True, **own), Place(dim))
    tokens = 33
    x, at = torch.randn(2, tokens, dim, requires_grad=True), span(2, tokens)
    q, k, v = mixer.project(x, at)
    sees = infllm_mask(mixer, q.detach(), k.detach())
    expected = mixer.wo(masked(q, k, v, sees).flatten(2))
    assert not sees[:, -1].all()  # some block is left out
    same_gradients(mixer(x, at)[0], expected, [x, *mixer.parameters()])


def test_infllm_is_dense_when_short_or_when_all_blocks_are_chosen(pick):
    heads, kv_heads, head_dim, dim = drawn(pick)
    dense = GQA(GQA.Config(heads, kv_heads, head_dim), Place(dim))
    x, at = torch.randn(2, 30, dim), span(2, 30)
    expected = dense(x, at)[0]
    for options in ({"dense": 30}, {"dense": 0, "selected": 6}, {"dense": 0, "selected": 1}):
        config = InfLLMV2.Config(heads, kv_heads, head_dim, block=4, kernel=4, stride=2, local=1, **options)
        mixer = InfLLMV2(config, Place(dim))
        assert mixer.state_dict().keys() == dense.state_dict().keys()
        mixer.load_state_dict(dense.state_dict())
        y = mixer(x, at)[0]
        if options["dense"]:
            assert torch.equal(y, expected)
        elif options["selected"] == 6:  # 8 blocks, of which the first and the last are read anyway
            close(y, expected)
        else:
            assert torch.allclose(y[:, :12], expected[:, :12], atol=1e-5)  # 3 blocks: first, chosen, own
            assert (y[:, 12:] - expected[:, 12:]).abs().max() > 1e-3


# -- NSA -------------------------------------------------------------------------------------------------------------


class Gates(nn.Module):
    """In place of the gates' projection: each branch open or shut for good."""

    def __init__(self, heads, *opened):
        super().__init__()
        self.register_buffer("gates", torch.tensor(opened).float().mul(200).sub(100).repeat_interleave(heads))

    def forward(self, x):
        return self.gates.expand(*x.shape[:2], -1)


def nsa(pick, **options):
    heads, kv_heads, head_dim, dim = drawn(pick)
    return NSA(NSA.Config(heads, kv_heads, head_dim, **{"size": 4, "stride": 2, "block": 4, **options}), Place(dim))


def test_nsa_is_fla(pick):
    """One set of keys and values for all branches, means of blocks that do not overlap: where the two agree."""
    block, selected, window = pick.choice([3, 4]), pick.choice([3, 4, 5]), pick.choice([1, 6])
    options = {"summary": "mean", "size": block, "stride": block, "block": block, "positions": "nope"}
    mixer = nsa(pick, selected=selected, window=window, **options)
    heads, groups, size = mixer.config.heads, mixer.config.kv_heads, mixer.head_dim
    with torch.no_grad():
        k, v = mixer.wkv.weight.view(2, 3, groups * size, -1).unbind(0)
        mixer.wkv.weight.copy_(torch.cat([k[0], k[0], k[0], v[0], v[0], v[0]]))
    tokens = 30 + pick.randint(0, 3)
    x, at = torch.randn(2, tokens, mixer.wq.in_features, requires_grad=True), span(2, tokens)
    q = mixer.wq(x).view(2, tokens, heads, size)
    parts = mixer.wkv(x).view(2, tokens, 6, groups, size).unbind(2)  # of equal values: what gradients are told apart by
    whole = tokens // block * block
    k_cmp, v_cmp = (parts[i][:, :whole].unflatten(1, (-1, block)).mean(2) for i in (0, 3))
    y_cmp, _ = naive_nsa_compression(q, k_cmp, v_cmp, block, size**-0.5)
    rest = torch.zeros(2, -(-tokens // block) - k_cmp.shape[1], groups, size)  # an open block is never seen
    chosen = naive_nsa_topk(q, torch.cat([k_cmp, rest], 1), selected, block, size**-0.5)
    y_slc = naive_nsa_selection(q, parts[1], parts[4], chosen, block, size**-0.5)
    near = torch.arange(tokens)[:, None] - torch.arange(tokens)
    y_win = masked(q, parts[2], parts[5], ((near >= 0) & (near < window))[None, :, None].expand(2, -1, groups, -1))
    gates = mixer.wgate(x).sigmoid().view(2, tokens, 3, heads, 1)
    expected = mixer.wo((gates * torch.stack([y_cmp, y_slc, y_win], 2)).sum(2).flatten(2))
    same_gradients(mixer(x, at)[0], expected, [x, *mixer.parameters()])


def test_nsa_scores_blocks_by_what_overlaps_them(pick):
    """The chosen blocks by loops, the formula of the paper with overlapping summaries."""
    c = {"size": pick.choice([4, 6]), "stride": 2, "block": pick.choice([4, 6]), "selected": 4, "window": 3}
    mixer = nsa(pick, **c)
    heads, groups, tokens, seen = mixer.config.heads, mixer.config.kv_heads, 40, {}

    def watch(module, inputs, output):
        seen["score"], seen["best"] = inputs[0], output

    mixer.choice.register_forward_hook(watch)
    x = torch.randn(1, tokens, mixer.wq.in_features)
    mixer(x, span(1, tokens))
    q = mixer.wq(x).view(tokens, heads, -1)
    k = mixer.wkv(x).view(tokens, 6, groups, -1)[:, 0]
    pieces = [k[s : s + c["size"]] for s in range(0, tokens - c["size"] + 1, 2)]
    keys = mixer.k_summary(torch.stack(pieces)[None])[0]
    t = tokens - 1
    for g in range(groups):
        share = heads // groups
        weights = (q[t, g * share : (g + 1) * share] @ keys[:, g].T * q.shape[2] ** -0.5).softmax(-1).sum(0)
        for j in range(1, t // c["block"] - 1):
            expected = 0.0
            for m in range(c["block"] // 2):
                for n in range(c["size"] // 2):
                    i = c["block"] // 2 * j + m - n
                    expected += weights[i].item() if 0 <= i < len(weights) else 0.0
            assert abs(seen["score"][0, t, g, j].item() - expected) < 1e-5
    assert seen["best"].shape[:3] == (1, tokens, groups)  # one choice for all heads of a group


def test_nsa_branches(pick):
    """Alone, the blocks when all are read are full attention, and the window is a window."""
    mixer = nsa(pick, selected=9, window=5)
    c, x, at = mixer.config, torch.randn(2, 33, mixer.wq.in_features), span(2, 33)
    parts = mixer.wkv.weight.view(6, -1, mixer.wq.in_features)
    for opened, keys, window in (((0, 1, 0), 1, 0), ((0, 0, 1), 2, 5)):
        mixer.wgate = Gates(c.heads, *opened)
        dense = GQA(GQA.Config(c.heads, c.kv_heads, mixer.head_dim, window), Place(mixer.wq.in_features))
        weights = torch.cat([mixer.wq.weight, parts[keys], parts[keys + 3]])
        dense.load_state_dict({"wqkv.weight": weights, "wo.weight": mixer.wo.weight})
        close(mixer(x, at)[0], dense(x, at)[0])


def test_nsa_reads_a_summary_once_its_block_is_complete(pick):
    mixer = nsa(pick, size=4, stride=4)
    mixer.wgate = Gates(mixer.config.heads, 1, 0, 0)
    x, at = torch.randn(1, 16, mixer.wq.in_features), span(1, 16)
    other = x.clone()
    other[:, 5] += 1
    moved = (mixer(x, at)[0] != mixer(other, at)[0]).any(2)[0]
    assert moved.tolist() == [t >= 7 for t in range(16)]  # its own query at 5 reads one summary: weight 1 in any case


# -- SPLA ------------------------------------------------------------------------------------------------------------


def spla_reads(mixer, q_BTHK, k_BTGK):
    """Which keys a token reads exactly, (B, T, G, S), by loops."""
    c = mixer.options
    rows, tokens, heads, size = q_BTHK.shape
    groups = k_BTGK.shape[2]
    columns = torch.arange(tokens)
    sees = torch.zeros(rows, tokens, groups, tokens, dtype=torch.bool)
    for b in range(rows):
        for t in range(tokens):
            here = t // c.block
            for g in range(groups):
                q = q_BTHK[b, t, g * heads // groups : (g + 1) * heads // groups] * size**-0.5
                blocks = [k_BTGK[b, j * c.block : (j + 1) * c.block, g] for j in range((t + 1) // c.block)]
                score = {}
                if blocks:
                    logs = [q @ k.mean(0) + (q**2 @ k.var(0, correction=0)) / 2 for k in blocks]
                    share = torch.stack(logs, 1).softmax(1).sum(0).tolist()
                    score = {j: share[j] for j in range(c.initial, here - c.local + 1)}
                best = sorted(score, key=lambda j: (-score[j], j))[: c.selected]
                read = torch.tensor([*range(c.initial), *range(here - c.local + 1, here + 1), *best])
                sees[b, t, g] = (columns <= t) & (columns[:, None] // c.block == read).any(1)
    return sees


def test_spla_is_softmax_over_the_chosen_and_linear_over_the_rest(pick):
    """The rest is summed directly here, token by token, and taken as a difference there."""
    heads, kv_heads, head_dim, dim = drawn(pick)
    own = {"block": pick.choice([3, 4]), "initial": pick.choice([0, 1]), "local": pick.choice([1, 2])}
    mixer = SPLA(SPLA.Config(heads, kv_heads, head_dim, selected=pick.choice([1, 2]), **own), Place(dim))
    nn.init.uniform_(mixer.rest, 0.5, 1.5)
    tokens = 29
    x, at = torch.randn(2, tokens, dim, requires_grad=True), span(2, tokens)
    q, k, v = mixer.project(x, at)
    sees = spla_reads(mixer, q.detach(), k.detach())
    rest = torch.ones(tokens, tokens).tril().bool()[None, :, None] & ~sees
    assert rest[:, -1].any()
    group = heads // kv_heads
    weights = torch.einsum("bthk,bshk->bths", q.softmax(-1), k.repeat_interleave(group, 2).softmax(-1))
    r = torch.einsum("bths,bshk->bthk", weights * rest.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
    r = r / (r.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.rest
    expected = mixer.wo((masked(q, k, v, sees) + r).flatten(2))
    same_gradients(mixer(x, at)[0], expected, [x, *mixer.parameters()], 2e-5)


def test_spla_is_dense_when_all_blocks_are_exact(pick):
    heads, kv_heads, head_dim, dim = drawn(pick)
    dense = GQA(GQA.Config(heads, kv_heads, head_dim), Place(dim))
    mixer = SPLA(SPLA.Config(heads, kv_heads, head_dim, block=4, local=1, selected=6), Place(dim))
    mixer.load_state_dict(dense.state_dict(), strict=False)
    x = torch.randn(2, 36, dim)
    y, expected = mixer(x, span(2, 36))[0], dense(x, span(2, 36))[0]
    close(y[:, :32], expected[:, :32])  # 8 blocks: the first, the last, 6 chosen
    assert (y[:, 32:] - expected[:, 32:]).abs().max() > 1e-3
    with torch.no_grad():
        mixer.rest.zero_()  # without the rest what is not chosen is lost
    assert (y - mixer(x, span(2, 36))[0])[:, 32:].abs().max() > 1e-3


def test_spla_scores_blocks_by_mean_and_spread(pick):
    """Of blocks with one mean the spread one has more of exp(q.k); with one key for all tokens a score is exact."""
    mixer = SPLA(SPLA.Config(1, 1, 4, positions="nope", block=4, initial=0, local=1, selected=1), Place(4))
    even, spread = torch.randn(4).expand(4, 4), torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * torch.ones(4)
    keys = torch.cat([even, even + spread, even + 0.5 * spread, torch.randn(1, 4)])[None, :, None]
    q, at, seen = torch.randn(1, 13, 1, 4), span(1, 13), {}
    mixer.choice.register_forward_hook(lambda module, inputs, chosen: seen.update(score=inputs[0]))
    view, _ = mixer.cut.append(None, at, View({"k": keys}, {}), moments=(("k",), moments_of))
    blocks = mixer.blocks(q, view, at, 4)
    assert set(blocks[0, 12, 0].tolist()) == {3, 1}
    keys[:, 4:12] = torch.randn(2, 1, 1, 4).repeat_interleave(4, 0).view(1, 8, 1, 4)
    view, _ = mixer.cut.append(None, at, View({"k": keys}, {}), moments=(("k",), moments_of))
    mixer.blocks(q, view, at, 4)
    mass = (keys[0, :12, 0] @ q[0, 12, 0] / 2).exp().view(3, 4).sum(1)
    close(seen["score"][0, 12, 0, :3], mass / mass.sum())


# -- dual chunk attention --------------------------------------------------------------------------------------------


def test_dual_chunk_by_its_distances(pick):
    """All scores by loops: the distance between a query and a key, told by their chunks."""
    heads, kv_heads, head_dim, dim = drawn(pick)
    chunk = pick.choice([6, 9])
    local = pick.randint(0, chunk // 3)
    size, tokens = chunk - local, 31
    mixer = DualChunkAttention(
        DualChunkAttention.Config(heads, kv_heads, head_dim, chunk=chunk, local=local), Place(dim)
    )
    x, at = torch.randn(2, tokens, dim, requires_grad=True), span(2, tokens)
    distance = torch.zeros(tokens, tokens).long()
    for i in range(tokens):
        for j in range(i + 1):
            apart = i // size - j // size
            place = (i % size, min(i % size + size, chunk), chunk)[min(apart, 2)]
            distance[i, j] = place - j % size
            exact = apart == 0 or (apart == 1 and i % size < local)
            assert 0 <= distance[i, j] <= chunk and (not exact or distance[i, j] == i - j)
    q, k, v = mixer.wqkv(x).unflatten(-1, (heads + 2 * kv_heads, head_dim)).split([heads, kv_heads, kv_heads], 2)
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = (distance[..., None] * frequency).repeat(1, 1, 2)  # queries turned by the distance, keys as they are
    turned = torch.cat([-q[..., head_dim // 2 :], q[..., : head_dim // 2]], -1)
    q_BTSHK = q[:, :, None] * angle.cos()[:, :, None] + turned[:, :, None] * angle.sin()[:, :, None]
    k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    logits = torch.einsum("btshk,bshk->bhts", q_BTSHK, k) * head_dim**-0.5
    weights = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)
    expected = mixer.wo(torch.einsum("bhts,bshk->bthk", weights, v).flatten(2))
    same_gradients(mixer(x, at)[0], expected, [x, *mixer.parameters()])


def test_dual_chunk_is_plain_up_to_its_chunk(pick):
    heads, kv_heads, head_dim, dim = drawn(pick)
    dense = GQA(GQA.Config(heads, kv_heads, head_dim), Place(dim))
    mixer = DualChunkAttention(DualChunkAttention.Config(heads, kv_heads, head_dim, chunk=16, local=7), Place(dim))
    mixer.load_state_dict(dense.state_dict())
    x = torch.randn(2, 30, dim)
    for tokens in (9, 16):
        close(mixer(x[:, :tokens], span(2, tokens))[0], dense(x[:, :tokens], span(2, tokens))[0])
    assert (mixer(x, span(2, 30))[0] - dense(x, span(2, 30))[0])[:, 17:].abs().max() > 1e-3


def test_merged_sets_are_one_softmax(pick):
    """Also gradients, gradients of gradients, and queries that see nothing."""
    sets, tokens, keys, groups = pick.choice([1, 3]), 7, 300, pick.choice([1, 2])
    q = torch.randn(sets, 2, tokens, 2 * groups, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, keys, groups, size, dtype=torch.float64, requires_grad=True) for size in (4, 3))
    at = torch.randint(-5, keys, (sets, 2, tokens)), torch.randint(0, keys, (2, keys))
    inside = torch.randint(-1, 3, (sets, 2, tokens)), torch.randint(-1, 3, (sets, 2, keys))
    args = (q, k, v, *at, *inside, 0.4)
    same_gradients(merged_attention(*args), written_out(*args)[0], [q, k, v], 1e-10)
    both = merged_attention(*args), written_out(*args)[0]
    once = [torch.autograd.grad(y.square().sum(), [q, k, v], create_graph=True) for y in both]
    twice = [torch.autograd.grad(sum(g.sin().sum() for g in found), [q, k, v]) for found in once]
    for one, other in zip(*twice, strict=True):
        close(one, other, 1e-8)


# -- mixture of attentions -------------------------------------------------------------------------------------------


def test_each_token_takes_the_answer_of_its_kind(pick):
    """With any choice, so also where neighbours differ; each kind has read all tokens, whoever answered there."""
    kinds = ("gqa(window=3)", "gated_deltanet", "lstm")
    selected = pick.choice([1, 2, 3])
    mixer = MixtureOfAttentions(MixtureOfAttentions.Config(kinds, selected), Place(32))
    x, at = torch.randn(2, 17, 32, requires_grad=True), span(2, 17)
    given = torch.rand(2, 17, 3).argsort(2)[..., :selected]
    answers = torch.stack([kind(x, at)[0] for kind in mixer.kinds], 2)
    p = mixer.router(x).softmax(2)
    own = mixer(x, at)[0]
    close(own, (p * (p >= p.sort(2).values[..., -selected, None]))[..., None].mul(answers).sum(2))
    mixer.choice.register_forward_hook(lambda module, inputs, chosen: given)
    taken = torch.zeros(2, 17, 3).scatter(2, given, 1.0)
    same_gradients(mixer(x, at)[0], ((p * taken)[..., None] * answers).sum(2), [x, *mixer.parameters()])
    assert selected == 3 or (mixer(x, at)[0] - own).abs().max() > 1e-3


def test_kinds_are_spread_by_the_balance_loss():
    """1 when tokens are spread evenly, the number of kinds when one takes all; padding is not counted."""
    mixer = MixtureOfAttentions(MixtureOfAttentions.Config(("gqa", "lstm"), balance=0.5), Place(32)).train()
    x, at = torch.randn(1, 6, 32), Span(torch.arange(6)[None], segments_BT=torch.tensor([[0, 0, 0, 0, -1, -1]]))
    for first, expected in (((1, 1, 1, 1, 1, 1), 1.0), ((1, 0, 1, 0, 0, 0), 0.5)):
        column = torch.tensor(first).float() * 200 - 100
        mixer.router = nn.Module()
        mixer.router.forward = lambda _, c=column: torch.stack([c, -c], 1)[None]
        at.losses.clear()
        mixer(x, at)
        close(at.losses[0], torch.tensor(expected))
    mixer.eval()(x, at)
    assert len(at.losses) == 1


# -- ring attention --------------------------------------------------------------------------------------------------

RANKS = 3
CASES = ("causal", "window", "full", "norms", "documents", "decoder")


@functools.cache
def ring_results():
    """(ranks, case) -> what went wrong in it on any rank; the processes are started once for all cases."""
    root, seed = Path(__file__).parents[2], str(random.randrange(1 << 30))
    print(f"seed {seed}")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(root / "tests/models/ring_ranks.py")]
        outputs = [open(Path(folder) / f"{rank}.txt", "w+") for rank in range(RANKS)]
        processes = [
            subprocess.Popen([*command, str(rank), folder, seed], env=environment, stdout=out, stderr=out)
            for rank, out in enumerate(outputs)
        ]
        end = time.monotonic() + 120
        while (
            time.monotonic() < end and any(p.poll() is None for p in processes) and not any(p.poll() for p in processes)
        ):
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.wait()
        done, said = {}, f"seed {seed}"
        for rank, out in enumerate(outputs):
            out.seek(0)
            said += f"\nrank {rank}: {out.read()[-2000:]}"
            out.close()
            lines = Path(folder) / f"{rank}.jsonl"
            for ranks, name, error in map(json.loads, lines.read_text().splitlines() if lines.exists() else []):
                done[ranks, name, rank] = f"seed {seed}\n{error}" if error else ""
    return done, said


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_ring_is_one_rank(ranks, case):
    """Outputs and gradients, those of parameters summed over ranks, of zigzag shards."""
    done, said = ring_results()
    errors = [done.get((ranks, case, rank), f"did not end; {said}") for rank in range(ranks)]
    assert not any(errors), "\n".join(errors)


def test_a_ring_needs_scores_that_add_up():
    with pytest.raises(ValueError, match="no ring_attention"):
        join(models.build("gqa"), None)
    for options in ({"scores": "softpick"}, {"scores": "softmax(sinks=True)"}, {"positions": "alibi"}):
        with pytest.raises(ValueError, match="plain softmax"):
            join(models.build("ring_attention", **options), object())


@pytest.mark.parametrize(
    "part,word",
    [
        ("infllm_v2(stride=5)", "stride"),
        ("infllm_v2(local=0)", "local"),
        ("nsa(selected=2)", "selected"),
        ("nsa(size=8)", "size"),
        ("dual_chunk_attention(local=1536)", "local"),
        ("spla(local=0)", "local"),
        ("mixture_of_attentions(selected=4)", "selected"),
        ("mixture_of_attentions(kinds=['gpa'])", "gqa"),
        ("spla(positions=alibi)", "positions"),
    ],
)
def test_a_value_that_cannot_be_is_named(part, word):
    with pytest.raises(ValueError, match=word) as error:
        models.build("decoder", pattern=part)
    assert "\n" not in str(error.value)
