"""attention: chunked against its form and torch, every kind of past, documents, padding and windows."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels import View, attention
from tests.kernels.physics import chain, close, using
from tests.kernels.test_gated_delta import packed


def inputs(tokens=63, rows=2, heads=4, groups=2, key=60, value=60, dtype=torch.float32, slots=0):
    made = {
        "q": torch.randn(rows, tokens, heads, key, dtype=dtype),
        "k": torch.randn(rows, tokens, groups, key, dtype=dtype),
        "v": torch.randn(rows, tokens, groups, value, dtype=dtype),
    }
    if slots:
        made["past_k"] = torch.randn(rows, slots, groups, key, dtype=dtype)
        made["past_v"] = torch.randn(rows, slots, groups, value, dtype=dtype)
    return made


def places(segments, length):
    """Positions of documents in a call: the carried one goes on at `length`, others start at 0."""
    positions = torch.zeros_like(segments)
    for row in range(len(segments)):
        for number in segments[row].unique():
            at = segments[row] == number
            positions[row, at] = torch.arange(int(at.sum())) + (int(length[row]) if number == 0 else 0)
    return positions


def run(length=None, segments=None, window=0, mask="causal", scale=None, table=None):
    def call(q, k, v, past_k=None, past_v=None):
        past = {} if past_k is None else {"k": past_k, "v": past_v}
        positions = None
        if segments is not None:
            positions = places(segments, torch.zeros(len(q)) if length is None else length)
        view = View({"k": k, "v": v}, past, length, positions, segments, table)
        return attention(q, view, window=window, mask=mask, scale=scale)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("window", [0, 7])
def test_chain(tokens, mask, window, dtype):
    chain(run(mask=mask, window=window), inputs(tokens, dtype=dtype))


@pytest.mark.parametrize("key, value", [(12, 20), (20, 12)])
@pytest.mark.parametrize("groups", [1, 4])
def test_chain_sizes(key, value, groups):
    chain(run(scale=0.3), inputs(33, key=key, value=value, groups=groups))


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize("lengths", [(0, 9), (16, 40), (3, 16)], ids=["fresh", "ring", "part"])
@pytest.mark.parametrize("window", [0, 6])
def test_chain_past(tokens, lengths, window):
    x = inputs(tokens, key=12, value=12, slots=16)
    chain(run(torch.tensor(lengths), window=window), x)


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("slots", [0, 16])
def test_chain_packed(mask, window, slots):
    x = inputs(63, rows=3, key=12, value=8, slots=slots)
    chain(run(torch.tensor([11, 0, 30]) if slots else None, packed(3, 63), window, mask), x)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("slots", [0, 64])
def test_chain_many_blocks(window, slots):
    x = inputs(600, rows=2, heads=2, groups=1, key=8, value=8, slots=slots)
    segments = torch.zeros(2, 600, dtype=torch.int64)
    segments[0, 100:], segments[0, 420:], segments[0, 130:140], segments[1, 300:310] = 1, 2, -1, -1
    length = torch.tensor([20, 64]) if slots else None
    chain(run(length, segments, window), x)
    chain(run(length, window=window), x)


@pytest.mark.parametrize(
    "segments", [None, torch.tensor([[0, 0, -1, 1, 1], [-1, 0, 0, 0, 0]])], ids=["plain", "packed"]
)
@pytest.mark.parametrize("length", [(5, 11), (0, 16), (16, 9), (40, 23)])
def test_paged_is_contiguous(length, segments):
    x, length = inputs(5, key=8, value=8, slots=16), torch.tensor(length)
    table = torch.tensor([[3, 7, 2, 6], [5, 1, 8, 4]])
    pools = {}
    for name in ("past_k", "past_v"):
        pool = torch.full((9, 4, 2, 8), torch.nan)  # page 0 and empty slots are never read
        pool[table] = x[name].view(2, 4, 4, 2, 8)
        pools[name] = pool
    window = 0 if (length <= 16).all() else 11
    contiguous = run(length, segments, window)(**x)
    paged = run(length, segments, window, table=table)(**{**x, **pools})
    close(paged, contiguous)
    with using("reference"):
        close(run(length, segments, window, table=table)(**{**x, **pools}), contiguous)
    # An empty slot is not read, whatever it holds; a page of the table past the row's length may be page 0.
    if (length <= 8).any():
        row = int(length.argmin())
        used = -(-int(length[row]) // 4)
        table = table.clone()
        table[row, used:] = 0
        close(run(length, segments, window, table=table)(**{**x, **pools}), contiguous)


def test_chain_paged():
    x = inputs(3, key=8, value=8, slots=0)
    x["past_k"], x["past_v"] = torch.randn(6, 4, 2, 8), torch.randn(6, 4, 2, 8)
    chain(run(torch.tensor([7, 2]), table=torch.tensor([[1, 3], [4, 5]])), x)


def test_is_torch_attention():
    x = inputs(63)
    for causal in (True, False):
        q, k, v = (x[n].transpose(1, 2) for n in "qkv")
        want = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        close(run(mask="causal" if causal else "full")(**x), want)


def test_documents_and_padding_are_as_if_alone():
    x, segments = inputs(40, rows=1, key=8, value=8, slots=16), torch.full((1, 40), -1)
    segments[0, 3:12], segments[0, 14:16], segments[0, 20:38] = 0, 1, 2
    segments[0, [6, 25, 26]] = -1
    length = torch.tensor([9])
    y = run(length, segments, 6)(**x)
    for number in range(3):
        at = segments[0] == number
        alone = {n: x[n][:, at] for n in "qkv"} | ({n: x[n] for n in ("past_k", "past_v")} if number == 0 else {})
        close(y[:, at], run(length if number == 0 else None, window=6)(**alone))
    assert (y[:, segments[0] < 0] == 0).all()


@pytest.mark.parametrize("cut", [1, 9, 29])
@pytest.mark.parametrize("window", [0, 6])
def test_split_anywhere_is_one_pass(cut, window):
    x = {n: v.requires_grad_() for n, v in inputs(30, key=8, value=8).items()}
    y = run(window=window)(**x)
    y1 = run(window=window)(**{n: v[:, :cut] for n, v in x.items()})
    past = {f"past_{n}": x[n][:, :cut] for n in "kv"}
    y2 = run(torch.full((2,), cut), window=window)(**{n: v[:, cut:] for n, v in x.items()}, **past)
    both = torch.cat([y1, y2], 1)
    close(both, y)
    one, two = (torch.autograd.grad(z.square().sum(), list(x.values())) for z in (y, both))
    for a, b in zip(one, two, strict=True):
        close(b, a)


def test_earlier_outputs_do_not_change_by_a_bit():
    for window, slots in ((0, 0), (9, 0), (0, 16), (9, 16)):
        x = inputs(300, key=16, value=16, slots=slots)
        call = run(torch.tensor([16, 5]) if slots else None, window=window)
        for cut in (1, 130, 270):
            changed = {n: torch.cat([v[:, :cut], v[:, cut:] * 0.5], 1) if n in "qkv" else v for n, v in x.items()}
            assert torch.equal(call(**changed)[:, :cut], call(**x)[:, :cut])


def test_rows_are_independent():
    x, segments, length = inputs(40, rows=3, slots=16), packed(3, 40), torch.tensor([3, 16, 0])
    y = run(length, segments)(**x)
    for row in range(3):
        at = slice(row, row + 1)
        close(run(length[at], segments[at])(**{n: v[at] for n, v in x.items()}), y[at])
    poisoned = {n: v.clone() for n, v in x.items()}
    for name in ("past_k", "past_v"):
        poisoned[name][0, 3:] = torch.nan  # slots a former owner of the row left
    close(run(length, segments)(**poisoned), y)


def test_past_of_another_dtype():
    x = inputs(4, key=8, value=8, slots=16)
    half = {n: v.bfloat16() if "past" in n else v for n, v in x.items()}
    rounded = {n: v.float() for n, v in half.items()}
    close(run(torch.tensor([9, 16]))(**half), run(torch.tensor([9, 16]))(**rounded))


def test_gradcheck():
    x = {
        n: v.double().requires_grad_() for n, v in inputs(5, rows=1, heads=2, groups=1, key=3, value=2, slots=4).items()
    }
    segments = torch.tensor([[0, 0, -1, 1, 1]])

    def call(*v):
        return run(torch.tensor([3]), segments, 3)(**dict(zip(x, v, strict=True)))

    with using("reference"):
        assert torch.autograd.gradcheck(call, tuple(x.values()))
    assert torch.autograd.gradcheck(call, tuple(x.values()))
    assert torch.autograd.gradgradcheck(call, tuple(x.values()))
    plain = tuple(v for n, v in x.items() if "past" not in n)
    assert torch.autograd.gradgradcheck(lambda *v: run()(*v), plain)


def test_mistakes_name_the_argument():
    x = inputs(4)
    with pytest.raises(ValueError, match="mask='causual'"):
        run(mask="causual")(**x)
    with pytest.raises(ValueError, match="window=-1"):
        run(window=-1)(**x)
    with pytest.raises(ValueError, match="multiple of G=3"):
        run()(x["q"], x["k"][:, :, :1].repeat(1, 1, 3, 1), x["v"][:, :, :1].repeat(1, 1, 3, 1))
    with pytest.raises(ValueError, match="length_B"):
        run()(**x, past_k=x["k"], past_v=x["v"])
    with pytest.raises(ValueError, match="view.new must have"):
        attention(x["q"], View({"key": x["k"]}, {}))
    with pytest.raises(TypeError, match="dtype"):
        run()(x["q"].double(), x["k"], x["v"])
