"""attention: each form against the definition and torch, every kind of past, documents, padding, windows, options."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels import View, attention
from tests.kernels.physics import DEVICE, chain, close, placed, using
from tests.kernels.recurrent import packed
from tests.kernels.suite import Differentiable, wrong

TREE = torch.tensor([[-1, 0, 0, 1, 1, 2, 5], [-1, -1, 1, 2, 0, 2, 4]])


def drawn(tokens=63, rows=1, heads=4, groups=2, key=60, value=60, slots=0):
    made = {
        "q": torch.randn(rows, tokens, heads, key),
        "k": torch.randn(rows, tokens, groups, key),
        "v": torch.randn(rows, tokens, groups, value),
    }
    if slots:
        made["past_k"] = torch.randn(rows, slots, groups, key)
        made["past_v"] = torch.randn(rows, slots, groups, value)
    return made


def places(segments, length=None):
    """Positions of documents in a call: the carried one goes on at `length`, others start at 0."""
    positions = torch.zeros_like(segments)
    for row in range(len(segments)):
        for number in segments[row].unique():
            at = segments[row] == number
            known = int(length[row]) if length is not None and number == 0 else 0
            positions[row, at] = torch.arange(int(at.sum())) + known
    return positions


def depths(parents, length=None):
    """Positions of the nodes of a tree."""
    found = torch.zeros_like(parents)
    for t in range(parents.shape[1]):
        parent = parents[:, t]
        found[:, t] = torch.where(parent >= 0, found.gather(1, parent.clamp(min=0)[:, None])[:, 0] + 1, 0)
    return found if length is None else found + length[:, None]


def run(**options):
    def call(q, k, v, past_k=None, past_v=None, length=None, positions=None, segments=None, table=None, **tensors):
        past = {} if past_k is None else {"k": past_k, "v": past_v}
        view = View({"k": k, "v": v}, past, length, positions, segments, table, tensors.pop("parents_BT", None))
        return attention(q, view, **options, **tensors)

    return call


def case(lengths=None, segments=None, page=0, parents=None, extra=(), options=None, **sizes):
    """lengths: of a past; page: its slots are in pages of this size; extra: of slopes, sinks, ssmax."""

    def draw():
        x = drawn(**sizes)
        rows, tokens, heads, _ = x["q"].shape
        length = None if lengths is None else torch.tensor(lengths)
        if segments is not None:
            x["segments"] = packed(rows, tokens) if segments == "packed" else segments
            x["positions"] = places(x["segments"], length)
        if parents is not None:
            x["parents_BT"], x["positions"] = parents, depths(parents, length)
        if length is not None:
            x["length"] = length
        if page:
            count = x["past_k"].shape[1] // page
            x["table"] = (torch.randperm(rows * count) + 1).view(rows, count)
            for name in ("past_k", "past_v"):
                pool = torch.zeros(rows * count + 1, page, *x[name].shape[2:])
                pool[x["table"]] = x[name].unflatten(1, (count, page))
                x[name] = pool
        for name in extra:
            x[f"{name}_H"] = torch.randn(heads) if name == "sinks" else torch.rand(heads) * 0.3
        return run(**(options or {})), x

    return draw


ALL = ("slopes", "sinks", "ssmax")
SMALL = {"rows": 2, "heads": 2, "groups": 1, "key": 3, "value": 2}
FEW = {"heads": 2, "groups": 1, "key": 24, "value": 16}
LONG = torch.zeros(2, 160, dtype=torch.int64)  # tiles are of 64 to 128 tokens
LONG[0, 30:], LONG[0, 140:], LONG[0, 60:70], LONG[1, 100:110] = 1, 2, -1, -1
NUMBERS = torch.tensor([[0, 0, -1, 1, 1], [-1, 1, 1, -1, 2]])


class TestAttention(Differentiable):
    CASES = {
        "causal": case(rows=2),
        "full": case(rows=2, options={"mask": "full"}),
        "one": case(tokens=1, extra=("sinks",)),
        "none": case(tokens=0),
        "window": case(options={"window": 7}),
        "window-of-one": case(options={"window": 1}, tokens=20, extra=("sinks",)),
        "window-full": case(tokens=40, options={"window": 7, "mask": "full"}),
        "heads-alone": case(tokens=33, groups=4, key=20, value=12, options={"scale": 0.3}),
        "one-group": case(tokens=33, groups=1, key=12, value=20),
        "wide": case(tokens=20, rows=1, heads=2, groups=1, key=200, value=256),
        "packed": case(segments="packed", rows=3, key=12, value=8),
        "packed-window": case(segments="packed", rows=3, key=12, value=8, options={"window": 5}),
        "packed-full": case(segments="packed", rows=3, key=12, value=8, options={"mask": "full"}),
        "packed-past": case((11, 0, 30), "packed", rows=3, key=12, value=8, slots=16, options={"window": 5}),
        "many-tiles": case(tokens=160, **FEW),
        "many-tiles-window": case(tokens=160, **FEW, options={"window": 70}),
        "many-tiles-full": case(tokens=160, **FEW, options={"mask": "full", "softcap": 2.0}),
        "many-tiles-packed": case(segments=LONG, tokens=160, rows=2, **FEW, options={"window": 50}, extra=("slopes",)),
        "many-tiles-documents": case(segments=LONG, tokens=160, rows=2, **FEW),
        "softcap": case(tokens=33, options={"softcap": 1.5}),
        "slopes": case(tokens=33, extra=("slopes",)),
        "slopes-full": case(tokens=33, extra=("slopes",), options={"mask": "full"}),
        "sinks": case(tokens=33, extra=("sinks",)),
        "ssmax": case(tokens=33, extra=("ssmax",), options={"window": 20}),
        "all": case(
            segments="packed", extra=ALL, tokens=50, rows=3, key=12, value=8, options={"softcap": 5.0, "window": 9}
        ),
        "all-full": case(
            segments="packed", extra=ALL, rows=2, key=12, value=8, options={"softcap": 5.0, "mask": "full"}
        ),
        "fresh-past": case((0, 9), tokens=5, rows=2, key=12, value=12, slots=16),
        "ring": case((16, 40), tokens=1, rows=2, key=12, value=12, slots=16, options={"window": 6}),
        "ring-packed": case((3, 40), NUMBERS, tokens=5, rows=2, key=12, value=12, slots=16, options={"window": 12}),
        "past-full": case((3, 16), tokens=40, rows=2, key=12, value=12, slots=16, options={"mask": "full"}),
        "past-all": case((3, 30), tokens=5, rows=2, key=12, value=8, slots=16, extra=ALL, options={"softcap": 2.0}),
        "long-past": case((290, 151), tokens=3, rows=2, slots=300, heads=8),
        "long-past-window": case((290, 151), tokens=3, rows=2, slots=300, key=20, value=16, options={"window": 200}),
        "paged": case((7, 30), tokens=3, rows=2, key=8, value=8, slots=32, page=4),
        "paged-packed": case(
            (7, 16), NUMBERS, tokens=5, rows=2, key=8, value=8, slots=16, page=4, options={"window": 9}
        ),
        "paged-long": case((299, 151), tokens=1, rows=2, key=20, value=16, slots=320, page=16, extra=("sinks",)),
        "tree": case(parents=TREE, tokens=7, rows=2, key=12, value=8),
        "tree-past": case((20, 9), parents=TREE, tokens=7, rows=2, **FEW, slots=32, extra=ALL, options={"window": 9}),
    }
    SMALL = {
        "plain": case(tokens=5, **SMALL),
        "past": case((3, 4), NUMBERS, tokens=5, slots=4, **SMALL, options={"window": 3}),
        "paged": case((3, 2), tokens=2, slots=4, page=2, **SMALL),
        "options": case(segments=NUMBERS, tokens=5, **SMALL, extra=ALL, options={"softcap": 2.0, "window": 3}),
        "full": case(tokens=4, **SMALL, extra=ALL, options={"softcap": 2.0, "mask": "full"}),
        "tree": case((2, 3), parents=TREE[:, :5], tokens=5, slots=4, **SMALL, extra=("slopes",)),
    }


def test_half_precision(form):
    call, x = case(tokens=33, extra=ALL)()
    chain(call, {n: v.half() for n, v in x.items()}, form)


@pytest.mark.parametrize("options", [{}, {"window": 50}], ids=str)
def test_many_blocks(options):
    segments = torch.zeros(2, 600, dtype=torch.int64)
    segments[0, 100:], segments[0, 420:], segments[0, 130:140], segments[1, 300:310] = 1, 2, -1, -1
    call, x = case((20, 64), segments, tokens=600, rows=2, slots=64, **FEW, options=options)()
    chain(call, x)


def test_latent_attention_reads_one_memory(form):
    """Values that are the first channels of the keys' own past."""
    x = {"q": torch.randn(2, 3, 20, 40), "new": torch.randn(2, 3, 1, 40), "past": torch.randn(2, 300, 1, 40)}
    lengths = torch.tensor([290, 77], device=DEVICE)

    def call(q, new, past):
        view = View({"k": new, "v": new[..., :32]}, {"k": past, "v": past[..., :32]}, lengths)
        return attention(q, view)

    for dtype in (torch.float32, torch.bfloat16):
        chain(call, {n: v.to(dtype) for n, v in x.items()}, form)


def test_one_token_is_its_value(form):
    """Alone, without a sink, its weight is 1 whatever the logit, which therefore has no gradient."""
    x = {n: v.requires_grad_() for n, v in placed(drawn(1, heads=2)).items()}
    with using(form):
        y = run()(**x)
        dq, dk, dv = torch.autograd.grad(y.square().sum(), list(x.values()))
    close(y, x["v"])
    close(dv, 2 * x["v"])
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_keys_of_576(form):
    x = drawn(2, rows=2, heads=16, groups=1, key=576, value=512, slots=20)
    chain(run(), {**x, "length": torch.tensor([20, 9])}, form, differentiable=False)


@pytest.mark.parametrize("segments", [None, NUMBERS], ids=["plain", "packed"])
@pytest.mark.parametrize("length", [(5, 11), (0, 16), (40, 23)])
def test_paged_is_contiguous(length, segments, form):
    x, length = drawn(5, rows=2, key=8, value=8, slots=16), torch.tensor(length)
    table = torch.tensor([[3, 7, 2, 6], [5, 1, 8, 4]])
    pools = {}
    for name in ("past_k", "past_v"):
        pool = torch.full((9, 4, 2, 8), torch.nan)  # page 0 and empty slots are never read
        pool[table] = x[name].view(2, 4, 4, 2, 8)
        pools[name] = pool
    call = run(window=0 if (length <= 16).all() else 11)
    here = {"length": length, "segments": segments, "positions": None if segments is None else places(segments, length)}
    with using(form):
        contiguous = call(**placed(x | here))
        close(call(**placed(x | here | pools | {"table": table})), contiguous)
        # An empty slot is not read, whatever it holds; a page of the table past the row's length may be page 0.
        if (length <= 8).any():
            row = int(length.argmin())
            table = table.clone()
            table[row, -(-int(length[row]) // 4) :] = 0
            close(call(**placed(x | here | pools | {"table": table})), contiguous)


def test_is_torch_attention(form):
    x = placed(drawn(63))
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    for causal in (True, False):
        want = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        with using(form):
            close(run(mask="causal" if causal else "full")(**x), want)


def test_options_are_their_equations(form):
    """All of it against one matrix of logits, written from the papers."""
    x = placed({**drawn(40, rows=1, heads=4, groups=4, key=16, value=16)})
    slopes, sinks, ssmax = (torch.rand(4, device=DEVICE) for _ in range(3))
    t = torch.arange(40, device=DEVICE)
    near = t[:, None] - t
    sees = (near >= 0) & (near < 11)
    logits = torch.einsum("thk,shk->hts", x["q"][0], x["k"][0]) / 4
    logits = logits * ssmax[:, None, None] * torch.log(sees.sum(1).float())[:, None]
    logits = 3 * torch.tanh(logits / 3) - slopes[:, None, None] * near
    weights = logits.masked_fill(~sees, -torch.inf).exp()
    weights = weights / (weights.sum(2, keepdim=True) + sinks.exp()[:, None, None])
    with using(form):
        y = run(window=11, softcap=3.0)(**x, slopes_H=slopes, sinks_H=sinks, ssmax_H=ssmax)
    close(y[0], torch.einsum("hts,shv->thv", weights, x["v"][0]))


def test_ssmax_of_full_counts_the_document():
    x = placed(drawn(9, rows=1, heads=1, groups=1, key=4, value=4))
    segments = torch.tensor([[0, 0, -1, 1, 1, 1, 1, -1, 1]])
    ssmax = torch.ones(1, device=DEVICE)
    both = run(mask="full")(**x, **placed({"segments": segments, "positions": places(segments)}), ssmax_H=ssmax)
    for number, count in ((0, 2), (1, 5)):
        at = (segments[0] == number).to(DEVICE)
        alone = run(mask="full", scale=math.log(count) / 2)(**{n: v[:, at] for n, v in x.items()})
        close(both[:, at], alone)


def test_a_branch_of_a_tree_is_a_sequence(form):
    x, parents, length = drawn(7, rows=2, slots=32, key=12, value=8), TREE, torch.tensor([20, 9])
    x, parents, length = placed(x), parents.to(DEVICE), length.to(DEVICE)
    with using(form):
        y = run(window=9)(**x, length=length, parents_BT=parents, positions=depths(parents, length))
        for row in range(2):
            for leaf in range(7):
                branch = [leaf]
                while parents[row, branch[0]] >= 0:
                    branch.insert(0, int(parents[row, branch[0]]))
                cut = {n: v[row : row + 1] if "past" in n else v[row : row + 1, branch] for n, v in x.items()}
                close(y[row, leaf], run(window=9)(**cut, length=length[row : row + 1])[0, -1])


def test_documents_and_padding_are_as_if_alone(form):
    x, segments = drawn(40, rows=1, key=8, value=8, slots=16), torch.full((1, 40), -1)
    segments[0, 3:12], segments[0, 14:16], segments[0, 20:38] = 0, 1, 2
    segments[0, [6, 25, 26]] = -1
    length = torch.tensor([9])
    x |= {"sinks_H": torch.randn(4)}
    with using(form):
        y = run(window=6)(**placed(x | {"length": length, "segments": segments, "positions": places(segments, length)}))
        for number in range(3):
            at = segments[0] == number
            alone = {n: x[n][:, at] for n in "qkv"} | {"sinks_H": x["sinks_H"]}
            if number == 0:
                alone |= {n: x[n] for n in ("past_k", "past_v")} | {"length": length}
            close(y[:, at], run(window=6)(**placed(alone)))
    assert (y[:, segments[0] < 0] == 0).all()


@pytest.mark.parametrize("cut", [1, 9, 29])
@pytest.mark.parametrize("window", [0, 6])
def test_split_anywhere_is_one_pass(cut, window):
    x = {n: v.requires_grad_() for n, v in placed(drawn(30, key=8, value=8)).items()}
    call = run(window=window)
    y = call(**x)
    y1 = call(**{n: v[:, :cut] for n, v in x.items()})
    past = {f"past_{n}": x[n][:, :cut] for n in "kv"}
    y2 = call(**{n: v[:, cut:] for n, v in x.items()}, **past, length=torch.tensor([cut], device=DEVICE))
    both = torch.cat([y1, y2], 1)
    close(both, y)
    one, two = (torch.autograd.grad(z.square().sum(), list(x.values())) for z in (y, both))
    for a, b in zip(one, two, strict=True):
        close(b, a)


def test_earlier_outputs_do_not_change_by_a_bit(form):
    tokens = 300 if form == "chunked" else 140
    for window, slots in ((0, 0), (9, 0), (0, 16), (9, 16)):
        x = placed(drawn(tokens, heads=2, groups=1, key=16, value=16, slots=slots))
        length = torch.tensor([5], device=DEVICE) if slots else None
        with using(form), torch.no_grad():
            y = run(window=window)(**x, length=length)
            for cut in (1, 130):
                changed = {n: torch.cat([v[:, :cut], v[:, cut:] * 0.5], 1) if n in "qkv" else v for n, v in x.items()}
                assert torch.equal(run(window=window)(**changed, length=length)[:, :cut], y[:, :cut])


def test_rows_are_independent(form):
    x = drawn(40, rows=3, key=8, value=8, slots=16)
    x |= {"segments": packed(3, 40), "length": torch.tensor([3, 16, 0])}
    x |= {"positions": places(x["segments"], x["length"])}
    x = placed(x)
    with using(form), torch.no_grad():
        y = run()(**x)
        for row in range(3):
            close(run()(**{n: v[row : row + 1] for n, v in x.items()}), y[row : row + 1])
        for name in ("past_k", "past_v"):
            x[name][0, 3:] = torch.nan  # slots a former owner of the row left
        close(run()(**x), y)


def test_past_of_another_dtype(form):
    x = placed({**drawn(4, rows=2, key=8, value=8, slots=16), "length": torch.tensor([9, 16])})
    half = {n: v.bfloat16() if "past" in n else v for n, v in x.items()}
    rounded = {n: v.float() if "past" in n else v for n, v in half.items()}
    with using(form):
        close(run()(**half), run()(**rounded))


def test_the_triton_form_says_what_it_does_not_take():
    with using("triton"), pytest.raises(ValueError, match="does not take"):
        run()(**placed(drawn(2, key=300, value=8)))


def test_mistakes_name_the_argument():
    x = drawn(4)
    wrong(run(mask="causual"), x, ValueError, "mask='causual'")
    wrong(run(window=-1), x, ValueError, "window=-1")
    wrong(run(softcap=-1.0), x, ValueError, "softcap=-1.0")
    three = {n: x[n][:, :, :1].repeat(1, 1, 3, 1) for n in "kv"}
    wrong(run(), x, ValueError, "multiple of G=3", **three)
    wrong(run(), x, ValueError, "length_B", past_k=x["k"], past_v=x["v"])
    wrong(run(), x, TypeError, "dtype", q=x["q"].double())
    wrong(run(), x, ValueError, "slopes_H", slopes_H=torch.ones(3))
    wrong(run(), x, TypeError, "sinks_H", sinks_H=torch.ones(4, dtype=torch.int64))
    wrong(run(), x, ValueError, "parents_BT", parents_BT=torch.zeros(1, 3, dtype=torch.int64))
    wrong(run(mask="full"), x, ValueError, "parents_BT", parents_BT=torch.zeros(1, 4, dtype=torch.int64))
    wrong(run(), x, ValueError, "segments_BT must be on", segments=torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    wrong(lambda q, k, v: attention(q, View({"key": k}, {})), x, ValueError, "view.new must have")
