"""block_sparse_attention: each form against the definition, dense attention, and what a selection means."""

import pytest
import torch

from kernels import View, attention, block_sparse_attention, linear_attention
from tests.kernels.physics import DEVICE, chain, close, placed, using
from tests.kernels.recurrent import packed
from tests.kernels.suite import Differentiable, wrong
from tests.kernels.test_attention import NUMBERS, places


def run(block=16, scale=None, linear=False):
    def call(q, k, v, blocks, past_k=None, past_v=None, length=None, segments=None, table=None, positions=None):
        past = {} if past_k is None else {"k": past_k, "v": past_v}
        view = View({"k": k, "v": v}, past, length, positions, segments, table)
        return block_sparse_attention(q, view, blocks, block=block, scale=scale, linear=linear)

    return call


def drawn(tokens=63, rows=1, heads=4, groups=2, key=60, value=60, slots=0, picks=3, block=16):
    """Blocks up to one past the last, some twice, some none; the first query's all future or none."""
    made = {
        "q": torch.randn(rows, tokens, heads, key),
        "k": torch.randn(rows, tokens, groups, key),
        "v": torch.randn(rows, tokens, groups, value),
        "blocks": torch.randint(-1, (slots + tokens) // block + 2, (rows, tokens, groups, picks)),
    }
    if slots:
        made["past_k"] = torch.randn(rows, slots, groups, key)
        made["past_v"] = torch.randn(rows, slots, groups, value)
    return made


def case(lengths=None, segments=None, page=0, block=16, scale=None, linear=False, **sizes):
    def draw():
        x = drawn(block=block, **sizes)
        rows, tokens = x["q"].shape[:2]
        if lengths is not None:
            x["length"] = torch.tensor(lengths)
        if segments is not None:
            x["segments"] = packed(rows, tokens) if segments == "packed" else segments
            x["positions"] = places(x["segments"], x.get("length"))
        if page:
            count = x["past_k"].shape[1] // page
            x["table"] = (torch.randperm(rows * count) + 1).view(rows, count)
            for name in ("past_k", "past_v"):
                pool = torch.zeros(rows * count + 1, page, *x[name].shape[2:])
                pool[x["table"]] = x[name].unflatten(1, (count, page))
                x[name] = pool
        return run(block, scale, linear), x

    return draw


TINY = {"rows": 2, "heads": 2, "groups": 1, "key": 3, "value": 2}


class TestBlockSparseAttention(Differentiable):
    CASES = {
        "plain": case(tokens=18, heads=2, groups=1, picks=2),
        "sizes": case(tokens=9, rows=2, heads=2, groups=2, key=20, value=12, scale=0.4, picks=2),
        "odd-block": case(tokens=22, block=5, picks=2, heads=3, groups=1, key=20, value=16),
        "large-block": case(tokens=34, block=33, picks=1, heads=1, groups=1, key=140, value=16),  # of two tiles
        "one": case(tokens=1, picks=1, heads=2),
        "none": case(tokens=0),
        "no-picks": case(tokens=5, picks=0, heads=2),
        "packed": case(segments="packed", tokens=14, rows=2, block=4, picks=2, heads=2, groups=1, key=20, value=16),
        "past": case((30, 9), tokens=3, rows=2, slots=32, heads=2, key=20, value=16),
        "past-packed": case((30, 9), NUMBERS, tokens=5, rows=2, slots=32, block=4, heads=2, groups=1, key=20, value=16),
        "paged": case((30, 9), tokens=2, rows=2, slots=32, page=8, block=4, heads=2, key=20, value=16),
        "ring": case((50, 9), tokens=2, rows=2, slots=32, block=8, picks=5, heads=2, key=20, value=16),
        "linear": case(tokens=18, heads=4, groups=2, picks=2, scale=0.5, linear=True),
        "linear-packed": case(segments="packed", tokens=14, rows=2, block=4, heads=2, groups=1, key=20, linear=True),
        "linear-paged": case((30, 9), tokens=2, rows=2, slots=32, page=8, block=4, heads=2, key=20, linear=True),
    }
    SMALL = {
        "plain": case(tokens=5, block=2, picks=2, **TINY),
        "packed": case(segments=NUMBERS, tokens=5, block=2, picks=2, **TINY),
        "past": case((3, 4), NUMBERS, tokens=5, slots=4, block=2, picks=2, **TINY),
        "linear": case((3, 4), NUMBERS, tokens=5, slots=4, block=2, picks=2, linear=True, **TINY),
    }


def everything(x, tokens, block, slots=0):
    count = -(-(slots + tokens) // block)
    return torch.arange(count, device=DEVICE).expand(*x["k"].shape[:3], -1)


@pytest.mark.parametrize("page", [0, 8])
@pytest.mark.parametrize("segments", [None, NUMBERS], ids=["plain", "packed"])
def test_all_blocks_are_attention(segments, page, form):
    _, x = case((30, 9), segments, page=page, block=12, tokens=5, rows=2, slots=32, key=20, value=16)()
    x = placed({n: v for n, v in x.items() if n != "blocks"})
    blocks = everything(x, 5, 12, 32)
    blocks = blocks[..., torch.randperm(blocks.shape[3], device=DEVICE)]
    past = {"k": x["past_k"], "v": x["past_v"]}
    view = View({"k": x["k"], "v": x["v"]}, past, x["length"], x.get("positions"), x.get("segments"), x.get("table"))
    with using(form):
        close(run(12)(**x, blocks=blocks), attention(x["q"], view))


def test_a_selection_is_a_mask(form):
    """Output and gradients are those of dense attention, written out, under the mask that the selection means."""
    x = {
        n: v.requires_grad_() if v.is_floating_point() else v
        for n, v in placed(drawn(24, picks=1, block=8, heads=4, groups=2, key=20, value=16)).items()
    }
    t = torch.arange(24, device=DEVICE)
    chosen = (t[:, None] // 8 == x["blocks"][0, :, :, None]).any(3) & (t <= t[:, None])[:, None]  # T, G, S
    mask = chosen.repeat_interleave(2, 1).transpose(0, 1)
    k, v = (x[n][0].repeat_interleave(2, 1) for n in "kv")
    logits = torch.einsum("thk,shk->hts", x["q"][0], k) / 20**0.5
    some = mask.any(2, keepdim=True)
    weights = logits.masked_fill(~mask & some, -torch.inf).softmax(2) * some
    want = torch.einsum("hts,shv->thv", weights, v)
    assert not some.all() and (mask.sum(2) == 8).any()
    leaves = [x[n] for n in "qkv"]
    with using(form):
        y = run(8)(**x)
        close(y[0], want)
        for ours, theirs in zip(
            torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves), strict=True
        ):
            close(ours, theirs)


def test_linear_weights_of_all_blocks_are_linear_attention(form):
    x = placed(drawn(40, block=8, heads=4, groups=2, key=20, value=16))
    blocks = everything(x, 40, 8)
    keys, values = (x[n].repeat_interleave(2, 2) for n in "kv")
    with using(form):
        close(run(8, 0.5, True)(**{**x, "blocks": blocks}), linear_attention(x["q"], keys, values, scale=0.5)[0])


def test_what_is_not_selected_does_not_matter(form):
    x = placed(drawn(40, picks=1, block=8, heads=2, groups=1, key=20, value=16))
    x["blocks"] = torch.where(x["blocks"] == 3, -1, x["blocks"])
    with using(form):
        y = run(8)(**x)
        for name in "kv":
            x[name] = x[name].clone()
            x[name][:, 24:32] = torch.nan
        assert torch.equal(run(8)(**x), y)


def test_order_and_repeats_do_not_matter(form):
    x = placed(drawn(20, block=8, heads=2, groups=1))
    with using(form):
        y = run(8)(**x)
        blocks = torch.cat([x["blocks"].flip(3), x["blocks"]], 3)
        close(run(8)(**{**x, "blocks": blocks}), y)


def test_positions_follow_from_segments(form):
    _, x = case((30, 9), NUMBERS, tokens=5, rows=2, slots=32, block=4, heads=2)()
    x = placed(x)
    with using(form):
        close(run(4)(**{**x, "positions": None}), run(4)(**x))


def test_half_precision(form):
    call, x = case(tokens=20, heads=2)()
    chain(call, {n: v.half() if v.is_floating_point() else v for n, v in x.items()}, form)


def test_mistakes_name_the_argument():
    x = drawn(4)
    wrong(run(), x, ValueError, "blocks_BTGN", blocks=x["blocks"][:, :3])
    wrong(run(), x, TypeError, "blocks_BTGN", blocks=x["blocks"].int())
    wrong(run(0), x, ValueError, "block=0")
    wrong(run(), x, ValueError, "view.new", v=x["v"][:, :3])
    wrong(run(), x, ValueError, "blocks_BTGN must be on", blocks=x["blocks"].to("meta"))
