"""The C++ behind decode steps: against the definitions, and what only it promises."""

from functools import partial

import pytest
import torch

from kernels import View, attention, cpu, rms_norm, rope, swiglu
from tests.kernels.physics import as_dtype, assert_as_good, using, widened

PARENTS = torch.tensor([[-1, 0, 0, 1, 2, 4], [-1, -1, 0, 1, 2, 3], [-1, 0, 1, 2, 3, 4]])
SEGMENTS = torch.tensor([[0, 0, -1, 1, 1, 2], [0, 0, 0, 0, -1, -1], [-1, 0, -1, 0, 1, 1]])


def positions(length_B, tokens, segments_BT=None, parents_BT=None):
    """Index of each token in its document or along its branch."""
    found = length_B[:, None] + torch.arange(tokens)
    for row in range(len(length_B)):
        count = {0: int(length_B[row])}
        for t in range(tokens):
            if parents_BT is not None:
                parent = int(parents_BT[row, t])
                found[row, t] = int(length_B[row]) if parent < 0 else int(found[row, parent]) + 1
            elif segments_BT is not None:
                segment = int(segments_BT[row, t])
                found[row, t] = count.setdefault(segment, 0)
                count[segment] += segment >= 0
    return found


def call(tokens=1, heads=4, groups=2, size=32, size_v=32, pages=8, page=16, far=1, paged=True, segments=None,
         parents=None, slopes=False, sinks=False, **options):  # fmt: skip
    """Attention over a past, as (function, its floating inputs); rows of length 0, of any, and nearly full."""
    rows = 3
    length_B = torch.tensor([0, 37 % (pages * page - tokens), far * pages * page - tokens])
    q, k, v = torch.randn(rows, tokens, heads + 2 * groups, max(size, size_v)).split([heads, groups, groups], 2)
    count = (rows * pages + 1, page) if paged else (rows, pages * page)
    inputs = {"q": q[..., :size], "k": k[..., :size], "v": v[..., :size_v]}
    inputs |= {"past_k": torch.randn(*count, groups, size), "past_v": torch.randn(*count, groups, size_v)}
    inputs |= {"slopes_H": torch.rand(heads) if slopes else None, "sinks_H": torch.randn(heads) if sinks else None}
    table_BN = torch.randperm(rows * pages).view(rows, pages) + 1 if paged else None
    at = positions(length_B, tokens, segments, parents)

    def run(q, k, v, past_k, past_v, **extra):
        past = {"k": past_k, "v": past_v}
        view = View({"k": k, "v": v}, past, length_B, at, segments, table_BN, parents)
        return attention(q, view, **options, **extra)

    return run, inputs


ATTENTION = {
    "one-token": partial(call),
    "five-tokens": partial(call, tokens=5),
    "contiguous": partial(call, tokens=2, paged=False, size=24, size_v=24),
    "odd-sizes": partial(call, tokens=2, size=40, size_v=20, page=7, pages=3),
    "size-64": partial(call, heads=10, groups=5, size=64, size_v=64),
    "size-128": partial(call, heads=2, groups=1, size=128, size_v=128),
    "window": partial(call, tokens=4, window=20),
    "ring": partial(call, tokens=4, window=20, pages=1, page=52, far=3),
    "extras": partial(call, tokens=3, softcap=5.0, slopes=True, sinks=True),
    "packed": partial(call, tokens=6, segments=SEGMENTS),
    "packed-window": partial(call, tokens=6, segments=SEGMENTS, window=9),
    "tree": partial(call, tokens=6, parents=PARENTS),
    "tree-extras": partial(call, tokens=6, parents=PARENTS, window=30, slopes=True),
}  # fmt: skip


def normed(x, weight):
    return rms_norm(x, weight, eps=1e-5)


def turned(x, angle, interleaved=False):
    return rope(x, angle.cos().float(), angle.sin().float(), interleaved=interleaved)


def gated(both):
    return swiglu(*both.chunk(2, -1))


def channels():
    """The small ops, at sizes that are no whole vectors and on views."""
    angle = torch.ldexp((torch.rand(3, 5, 10) * 64).round(), torch.tensor(-5))
    yield "rms_norm", normed, {"x": torch.randn(3, 5, 100), "weight": torch.randn(100)}
    yield "rms_norm-plain", partial(rms_norm, eps=1e-5), {"x": torch.randn(4, 64)}
    yield "rope", turned, {"x": torch.randn(3, 5, 8, 30)[:, :, 2:6], "angle": angle}
    yield "rope-interleaved", partial(turned, interleaved=True), {"x": torch.randn(3, 5, 4, 20), "angle": angle}
    yield "swiglu", gated, {"both": torch.randn(3, 5, 2 * 70) * 4}


def hold(run, inputs, dtype, name):
    """As good as the definition in its dtype, and the C++ is what ran."""
    given = {n: as_dtype(x, dtype) for n, x in inputs.items()}
    with using("reference"):
        exact, want = run(**widened(given)), run(**given)
    seen = []
    original = cpu.serves
    with using("chunked"), torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "serves", lambda *x: seen.append(original(*x)) or seen[-1])
        ours = run(**given)
    assert seen == [True], f"{name}: not the C++"
    assert_as_good(ours, want, exact, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_over_a_past(name, dtype):
    hold(*ATTENTION[name](), dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_ops(dtype):
    for name, run, inputs in channels():
        hold(run, inputs, dtype, name)


@pytest.mark.parametrize("before", [0, 5, 15, 16, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_does_not_know_how_many_come_with_it(dtype, before):
    """Six tokens in one call and one by one, alone and beside another row: the same bits. So drafts change nothing."""
    k, v, q = (torch.randn(2, 48, heads, 32).to(dtype) for heads in (2, 2, 4))
    pool_k, pool_v = torch.zeros(2, 17, 16, 2, 32, dtype=dtype)
    table_BN = torch.randperm(16).view(2, 8) + 1
    page_BT = table_BN.repeat_interleave(16, 1)

    def write(start, end):
        for pool, new in ((pool_k, k), (pool_v, v)):
            pool[page_BT[:, start:end], torch.arange(start, end) % 16] = new[:, start:end]

    def step(rows, start, end):
        new = {"k": k[rows, start:end], "v": v[rows, start:end]}
        length_B = torch.full((len(q[rows]),), start)
        view = View(new, {"k": pool_k, "v": pool_v}, length_B, None, None, table_BN[rows])
        with torch.inference_mode():
            return attention(q[rows, start:end], view)

    write(0, before)
    together = step(slice(0, 2), before, before + 6)
    for t in range(6):
        alone = step(slice(1, 2), before + t, before + t + 1)
        assert torch.equal(alone[0, 0], together[1, t]), (before, t)
        write(before + t, before + t + 1)


def test_what_nobody_wrote_is_never_read():
    run, inputs = call(tokens=2)
    poisoned = {n: x.clone() if x is not None else None for n, x in inputs.items()}
    poisoned["past_k"][0], poisoned["past_v"][0] = torch.nan, torch.nan  # page 0 belongs to nobody
    with torch.inference_mode():
        assert torch.equal(run(**inputs), run(**poisoned))


def test_without_a_compiler_plain_torch_takes_over(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    told = []
    monkeypatch.setattr(cpu.log, "warning", lambda line, *values: told.append(line % values))
    assert cpu.available.__wrapped__() is False
    assert len(told) == 1 and "no C++ compiler" in told[0] and "plain torch is used" in told[0]


def test_recorded_calls_stay_with_torch():
    """Whatever autograd may have to go through is not for C++."""
    x = torch.randn(2, 8)
    assert not cpu.serves(x)
    with torch.inference_mode():
        assert cpu.serves(x) and not cpu.serves(x.double()) and not cpu.serves(x, x.half())
