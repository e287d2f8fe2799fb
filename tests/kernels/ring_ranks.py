"""One of four processes, run by test_ring.py as `python ring_ranks.py RANK FOLDER`.

The first 1, 2, 3 and then all 4 of them form a gloo group and run the cases of their table together. Each writes a line
a case to FOLDER/RANK.jsonl: [ranks, name, what went wrong or ""]. A case holds the sharded call to the whole one:
outputs and gradients are gathered, put together and compared as `physics.chain` does, exact being the definition in
float64. After a failure a rank stops, for the others may be anywhere.
"""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import kernels
from kernels import op
from kernels.attention import View
from kernels.attention.partial import attend, attend_grad
from kernels.ring import attention as ring
from kernels.ring import exchange, recurrence, shard, unshard
from tests.kernels.conftest import poisoned
from tests.kernels.physics import as_dtype, assert_as_good, close, judge, moves, using
from tests.kernels.recurrent import packed

RANKS = 4
CASES = {}
current = None  # the group whose cases are running


def case(name, ranks=(2, 3, 4)):
    """Registers a function of (rank, ranks, group)."""

    def add(function):
        CASES[name] = (ranks, function)
        return function

    return add


def gathered(x, lengths=None):
    """`x` of every rank; lengths: of dimension 1, where they differ."""
    if lengths is None:
        return list(exchange.gather(x, current))
    longest = x.new_zeros(x.shape[0], max(lengths), *x.shape[2:])
    longest[:, : x.shape[1]] = x
    every = exchange.gather(longest, current)
    return [part[:, :n] for part, n in zip(every, lengths, strict=True)]


def anywhere(wrong):
    """Whether any rank says so."""
    return any(said.item() for said in gathered(torch.tensor([wrong])))


def pulled(call, inputs, grads):
    """Outputs of `call(**inputs)`, then the gradients of its floating inputs, by name."""
    leaves = {n: x.detach().clone().requires_grad_() if moves(x) else x for n, x in inputs.items()}
    outputs = call(**leaves)
    wanted = {n: x for n, x in leaves.items() if moves(x)}
    grads = [None if g is None else g.to(y.dtype) for y, g in zip(outputs, grads, strict=True)]
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    if not pairs:  # no tokens
        return outputs, {n: torch.zeros_like(x) for n, x in wanted.items()}
    found = torch.autograd.grad(
        [y for y, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return [y.detach() for y in outputs], dict(zip(wanted, found, strict=True))


def definition(call, inputs, grads):
    with using("reference"):
        return [
            pulled(call, {n: as_dtype(x, torch.float64) for n, x in inputs.items()}, grads),
            pulled(call, inputs, grads),
        ]


# Attention


def drawn(ranks, piece, balance, heads, sizes, dtype, rows):
    tokens = ranks * piece * (2 if balance == "zigzag" else 1)
    (many, few), (size, size_v) = heads, sizes
    shapes = {"q": (many, size), "k": (few, size), "v": (few, size_v)}
    inputs = {n: torch.randn(rows, tokens, *shape).to(dtype) for n, shape in shapes.items()}
    return inputs, torch.randn(rows, tokens, many, size_v).to(torch.bfloat16)


def one_block(inputs, dy, segments, scale=None, window=0, mask="causal"):
    """Gradients by one block of all keys: the formula of a ring of one rank, less exact than the definition's.

    What sharding may cost is measured against that: its delta is of a rounded y, the definition knows the exact one.
    """
    q, k, v = inputs.values()
    at = torch.arange(q.shape[1]).expand(q.shape[0], -1)
    options = (at, at, segments, segments, q.shape[3] ** -0.5 if scale is None else scale, window, mask == "causal")
    y, lse = attend(q, k, v, *options)
    delta = (y * dy).sum(-1)
    found = attend_grad(q, k, v, *options, lse, delta, dy.to(q.dtype))
    return {n: x.to(q.dtype) for n, x in zip(inputs, found, strict=True)}


def whole_attention(segments=None, **options):
    def call(q, k, v):
        return (kernels.attention(q, View({"k": k, "v": v}, {}, segments_BT=segments), **options),)

    return call


def ring_attention(
    rank, ranks, group, piece=5, balance="zigzag", packing=False, heads=(4, 2), sizes=(20, 12), dtype=torch.float32,
    form="chunked", rows=2, make=lambda call: call, **options,
):  # fmt: skip
    def mine(x):
        return None if x is None else shard(x, rank, ranks, balance)

    def measure(_, errors):
        inputs, dy = drawn(ranks, piece, balance, heads, sizes, dtype, rows)
        segments = packed(rows, dy.shape[1]) if packing else None
        (exact, exact_grads), (plain, plain_grads) = definition(whole_attention(segments, **options), inputs, [dy])
        block = one_block(inputs, dy, segments, **options)

        def call(q, k, v):
            return (kernels.ring_attention(q, k, v, group, balance=balance, segments_BT=mine(segments), **options),)

        with using(form):
            ours, grads = pulled(make(call), {n: mine(x) for n, x in inputs.items()}, [mine(dy)])
        errors.add("y", unshard(gathered(ours[0]), balance), plain[0], exact[0])
        for name, part in grads.items():
            worse = max((plain_grads[name], block[name]), key=lambda x: (x.double() - exact_grads[name]).abs().sum())
            errors.add(f"gradient of {name}", unshard(gathered(part), balance), worse, exact_grads[name])

    judge(measure, torch.finfo(dtype).eps, anywhere)


ATTENTION = {
    "causal": {},
    "causal, contiguous": {"balance": "contiguous", "piece": 7},
    "bf16": {"dtype": torch.bfloat16, "piece": 9},
    "full": {"mask": "full", "balance": "contiguous"},
    "full, zigzag, packed": {"mask": "full", "packing": True, "piece": 8},
    "window in a piece": {"window": 3},
    "window of several pieces": {"window": 13, "piece": 4, "packing": True},
    "window in a shard, contiguous": {"window": 4, "balance": "contiguous", "piece": 9},
    "window of a shard and a token": {"window": 10, "balance": "contiguous", "piece": 9},
    "window over shards, contiguous": {"window": 8, "balance": "contiguous", "piece": 5},
    "window, full": {"window": 6, "mask": "full", "balance": "contiguous"},
    "packed": {"packing": True, "piece": 11},
    "packed, contiguous": {"packing": True, "piece": 11, "balance": "contiguous"},
    "one key head": {"heads": (3, 1), "sizes": (7, 33)},
    "all heads, scale": {"heads": (3, 3), "scale": 0.7},
    "a token a rank": {"piece": 1, "balance": "contiguous"},
    "two tokens a rank": {"piece": 1, "packing": True},
    "no tokens": {"piece": 0},
}
for _name, _options in ATTENTION.items():
    case(f"attention: {_name}")(lambda *at, options=_options: ring_attention(*at, **options))


@case("attention: alone", ranks=(1,))
def alone(*at):
    ring_attention(*at, packing=True)


@case("attention: Triton", ranks=(3,))
def attention_triton(*at):
    ring_attention(*at, form="triton", rows=1, heads=(2, 1), sizes=(16, 16), packing=True, window=17)
    ring_attention(*at, form="triton", rows=1, heads=(2, 1), sizes=(16, 16))


@case("attention: several calls, and blocks of queries", ranks=(2,))
def attention_again(*at):
    """More tokens than plain torch takes at once, twice in one graph: messages of two calls do not mix."""

    def twice(call):
        return lambda q, k, v: (call(q, k, call(q, k, v)[0])[0],)

    rank, ranks, group = at
    inputs, dy = drawn(ranks, 150, "zigzag", (1, 1), (8, 8), torch.float32, 1)
    (exact, exact_grads), (plain, plain_grads) = definition(twice(whole_attention()), inputs, [dy])
    call = twice(lambda q, k, v: (kernels.ring_attention(q, k, v, group),))
    ours, grads = pulled(call, {n: shard(x, rank, ranks) for n, x in inputs.items()}, [shard(dy, rank, ranks)])
    assert_as_good(unshard(gathered(ours[0])), plain[0], exact[0])
    for name, part in grads.items():
        assert_as_good(unshard(gathered(part)), plain_grads[name], exact_grads[name], name)


@case("attention: compiled", ranks=(2,))
def attention_compiled(rank, ranks, group):
    def compiled(call):
        return torch.compile(call, fullgraph=True, backend="aot_eager")

    for each in (group, group.group_name):
        torch.compiler.reset()
        ring_attention(rank, ranks, each, make=compiled, packing=True)


@case("attention: torch's own check", ranks=(2,))
def attention_checked(rank, ranks, group):
    x = torch.randn(1, 4, 2, 6, requires_grad=True)
    torch.library.opcheck(ring._op._opoverload, (x, x, x, None, group.group_name, 0.3, 0, True, "zigzag"))


@case("attention: only some gradients")
def attention_needs(rank, ranks, group):
    q, k, v = torch.randn(3, 1, 4, 2, 6)
    _, (dq, dk, dv) = None, three(q, k, v, group)
    for i, want in enumerate((dq, dk, dv)):
        leaves = [x.clone().requires_grad_(j == i) for j, x in enumerate((q, k, v))]
        kernels.ring_attention(*leaves, group).square().sum().backward()
        assert torch.equal(leaves[i].grad, want)


def three(q, k, v, group):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(kernels.ring_attention(*leaves, group).square().sum(), leaves)


@case("attention: mistakes")
def attention_mistakes(rank, ranks, group):
    q, k, v = torch.randn(3, 1, 4, 2, 6)
    for error, says, call in (
        (ValueError, "H=2", lambda: kernels.ring_attention(q, k[:, :, [0, 0, 0]], v[:, :, [0, 0, 0]], group)),
        (ValueError, "balance='zag'", lambda: kernels.ring_attention(q, k, v, group, balance="zag")),
        (ValueError, "window=-1", lambda: kernels.ring_attention(q, k, v, group, window=-1)),
        (ValueError, "mask='none'", lambda: kernels.ring_attention(q, k, v, group, mask="none")),
        (ValueError, "k_BTGK", lambda: kernels.ring_attention(q, k[:, 1:], v, group)),
        (TypeError, "v_BTGV", lambda: kernels.ring_attention(q, k, v.double(), group)),
        (TypeError, "segments_BT", lambda: kernels.ring_attention(q, k, v, group, segments_BT=q[:, :, 0, 0])),
        (TypeError, "group", lambda: kernels.ring_attention(q, k, v, None)),
        (ValueError, "T=3 of q_BTHK must be even", lambda: kernels.ring_attention(q[:, 1:], k[:, 1:], v[:, 1:], group)),
        (ValueError, "10 tokens must be a multiple", lambda: shard(torch.zeros(1, 10), 0, 4)),
        (NotImplementedError, "gradients of gradients", lambda: second(q, k, v, group)),
    ):
        raises(error, says, call)


def second(q, k, v, group):
    leaf = q.clone().requires_grad_()
    torch.autograd.grad(kernels.ring_attention(leaf, k, v, group).sum(), leaf, create_graph=True)


def raises(error, says, call):
    try:
        call()
    except error as found:
        assert says in str(found) and "\n" not in str(found), str(found)
    else:
        raise AssertionError(f"no {error.__name__} about {says}")


@case("attention: ranks differ")
def attention_differs(rank, ranks, group):
    q = torch.ones(1, 4 + 2 * (rank == 1), 2, 6)
    raises(ValueError, "T must be the same on every rank", lambda: kernels.ring_attention(q, q, q, group))
    q = torch.ones(1, 4, 2, 6)
    window = 5 + (rank == 1)
    raises(ValueError, "window must be the same", lambda: kernels.ring_attention(q, q, q, group, window=window))
    segments = torch.zeros(1, 4, dtype=torch.int64) if rank else None
    raises(ValueError, "segments_BT", lambda: kernels.ring_attention(q, q, q, group, segments_BT=segments))
    ring_attention(rank, ranks, group)  # and the group still works


@case("attention: a part of the ranks", ranks=(4,))
def attention_in_a_group(rank, ranks, group):
    """Two groups of other ranks than the first ones at the same time: a rank is its number in its group."""
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    inputs, dy = drawn(2, 4, "zigzag", (2, 1), (8, 8), torch.float32, 1)
    (exact, _), (plain, _) = definition(whole_attention(), inputs, [dy])
    mine = {n: shard(x, rank // 2, 2) for n, x in inputs.items()}
    y = kernels.ring_attention(*mine.values(), halves[rank % 2])
    assert_as_good(y, shard(plain[0], rank // 2, 2), shard(exact[0], rank // 2, 2))
    ours, _ = kernels.ring_recurrence(
        kernels.diagonal_scan, torch.tensor([2.0]), torch.ones(1, 1, 1), group=halves[rank % 2]
    )
    assert ours.item() == (1.0, 3.0)[rank // 2]


@case("attention: the same work on every rank")
def attention_work(rank, ranks, group):
    """Pairs of tokens that blocks are made of, and keys that travel, forward and backward."""

    def pairs(balance, **options):
        counts, original = [0, 0], (ring.attend, ring.attend_grad)

        def counting(i):
            def call(q, k, *rest):
                counts[i] += q.shape[1] * k.shape[1]
                return original[i](q, k, *rest)

            return call

        ring.attend, ring.attend_grad = counting(0), counting(1)
        try:
            x = torch.randn(1, 8, 1, 4, requires_grad=True)
            kernels.ring_attention(x, x, x, group, balance=balance, **options).sum().backward()
        finally:
            ring.attend, ring.attend_grad = original
        assert counts[0] == counts[1]
        return [part.item() for part in gathered(torch.tensor(counts[0]))]

    even, uneven = pairs("zigzag"), pairs("contiguous")
    assert len(set(even)) == 1 and even[0] == 64 + 32 * (ranks - 1), even
    assert uneven == [64 * (r + 1) for r in range(ranks)]
    assert pairs("contiguous", mask="full") == [64 * ranks] * ranks
    near = pairs("contiguous", window=9)  # one token of the shard before the last one
    assert near == [64 * min(r + 1, 2) for r in range(ranks)], near
    assert pairs("contiguous", window=10) == [64 * min(r + 1, 3) for r in range(ranks)]
    assert pairs("contiguous", window=1) == [64] * ranks


@case("attention: the next keys travel before a block is computed")
def attention_overlap(rank, ranks, group):
    seen, attend, start = [], ring.attend, exchange.Exchange.__init__

    def computing(*args):
        seen.append("compute")
        return attend(*args)

    def starting(self, *args):
        seen.append("send")
        start(self, *args)

    ring.attend, exchange.Exchange.__init__ = computing, starting
    try:
        x = torch.randn(1, 4, 1, 4)
        kernels.ring_attention(x, x, x, group)
    finally:
        ring.attend, exchange.Exchange.__init__ = attend, start
    assert seen == ["send", "compute"] * (ranks - 1) + ["compute"]


@case("attention: broken on purpose", ranks=(3,))
def attention_broken(*at):
    """What the cases above would not notice if it were wrong: nothing."""

    def average(y, lse, part, part_lse):
        y.add_(part).div_(2)
        lse.copy_(torch.logaddexp(lse, part_lse))

    def old_lse(y, lse, part, part_lse):
        before, merged = lse.clone(), ring_merge(y, lse, part, part_lse)
        lse.copy_(before)
        return merged

    ring_merge, places = ring.merge, ring.Ring.places
    for owner, name, broken in (
        (ring, "merge", average),
        (ring, "merge", old_lse),
        (ring, "_add", lambda *a: None),
        (ring.Ring, "places", lambda self, rank, columns, like: places(self, self.rank, columns, like)),
    ):
        right = getattr(owner, name)
        setattr(owner, name, broken)
        try:
            ring_attention(*at, packing=True, piece=8)
        except AssertionError:
            pass
        else:
            raise AssertionError(f"nobody saw a wrong {name}")
        finally:
            setattr(owner, name, right)


# Recurrences


def inputs_of(run, tokens, rows, kind):
    """(tensors by name in the order of the call, the state) of one recurrence."""
    heads, size, size_v = 2, 7, 5
    if run is kernels.diagonal_scan:
        make = torch.randn if kind != "complex" else lambda *s: torch.randn(*s, dtype=torch.complex64)
        shape = (rows, tokens, 3, 2)
        decay = make(*(shape[2:] if kind == "fixed" else shape)) * 0.6
        return {"decay": decay, "x": make(*shape)}, make(rows, 3, 2)
    q, k, a, b = torch.randn(4, rows, tokens, heads, size)
    k = torch.nn.functional.normalize(k, dim=-1)
    v = torch.randn(rows, tokens, heads, size_v)
    decay = {"head": -torch.rand(rows, tokens, heads), "channel": -torch.rand(rows, tokens, heads, size) * 0.3}.get(
        kind
    )
    state = torch.randn(rows, heads, size, size_v)
    if run is kernels.linear_attention:
        if kind == "normalised":
            return {"q": q.abs(), "k": k.abs(), "v": v, "decay": None}, torch.rand(rows, heads, size, size_v + 1)
        return {"q": q, "k": k, "v": v, "decay": decay}, state
    if run is kernels.gated_delta:
        return {"q": q, "k": k, "v": v, "decay": decay, "beta": torch.rand(rows, tokens, heads)}, state
    a = torch.nn.functional.normalize(a, dim=-1)
    return {"q": q, "k": k, "v": v, "decay": decay, "a": a, "b": -a * 0.8 + 0.1 * b}, state


def ring_recurrence(
    rank, ranks, group, run, kind, lengths=(9, 14, 1, 20), packing=False, carried=True, keep=0, form="chunked",
    dtype=torch.float32, rows=2, make=lambda call: call, **options,
):  # fmt: skip
    lengths = lengths[:ranks]
    tokens, begin = sum(lengths), sum(lengths[:rank])
    columns = slice(begin, begin + lengths[rank])
    name = "state" if run is kernels.diagonal_scan else "state_BHKV"
    last = rank == ranks - 1

    def measure(_, errors):
        inputs, state = inputs_of(run, tokens, rows, kind)
        inputs = {n: as_dtype(x, dtype) for n, x in inputs.items()}
        fixed = [n for n, x in inputs.items() if x is not None and x.shape[:2] != (rows, tokens)]
        segments = packed(rows, tokens) if packing else None

        def whole(state=None, **tensors):
            return run(*tensors.values(), **{name: state}, segments_BT=segments, keep=keep, **options)

        def mine(state=None, **tensors):
            own = None if segments is None else segments[:, columns]
            return kernels.ring_recurrence(
                run, *tensors.values(), group=group, state=state, segments_BT=own, keep=keep, **options
            )

        given = {**inputs, "state": state} if carried else inputs
        with using("reference"):
            shapes = [y.shape for y in whole(**given)]
        grads = [torch.randn(shape) for shape in shapes]
        if inputs[next(iter(inputs))].is_complex():
            grads = [torch.randn(shape, dtype=torch.complex64) for shape in shapes]
        (exact, exact_grads), (plain, plain_grads) = definition(whole, given, grads)
        cut = {n: x if x is None or n in (*fixed, "state") else x[:, columns] for n, x in given.items()}
        with using(form):
            ours, found = pulled(make(mine), cut, [grads[0][:, columns], grads[1] if last else None])
        errors.add("y", torch.cat(gathered(ours[0], lengths), 1), plain[0], exact[0])
        if last:
            errors.add("state", ours[1], plain[1], exact[1])
        for what, part in found.items():
            if what in fixed:
                full = sum(gathered(part))
            elif what == "state":
                full = gathered(part)[0]
                assert rank == 0 or not part.any()
            else:
                full = torch.cat(gathered(part, lengths), 1)
            errors.add(f"gradient of {what}", full, plain_grads[what], exact_grads[what])

    judge(measure, torch.finfo(dtype).eps, anywhere)


LINEAR, DELTA = kernels.linear_attention, kernels.gated_delta
RECURRENCE = {
    "linear": (LINEAR, None, {}),
    "linear, decay": (LINEAR, "head", {"packing": True, "scale": 0.5}),
    "linear, channels": (LINEAR, "channel", {"packing": True}),
    "linear, normalised": (LINEAR, "normalised", {"normalize": True}),
    "delta": (DELTA, None, {}),
    "delta, decay": (DELTA, "head", {"packing": True}),
    "delta, channels": (DELTA, "channel", {"packing": True, "scale": 1.0}),
    "delta, no state": (DELTA, "head", {"carried": False, "lengths": (40, 33, 70, 1)}),
    "delta, bf16": (DELTA, "head", {"dtype": torch.bfloat16}),
    "delta, kept moments": (DELTA, "head", {"lengths": (5, 7, 9, 6), "keep": 3}),
    "generalised": (kernels.generalized_delta, "channel", {}),
    "generalised, packed": (kernels.generalized_delta, "channel", {"packing": True}),
    "scan": (kernels.diagonal_scan, "", {}),
    "scan, packed": (kernels.diagonal_scan, "", {"packing": True}),
    "scan, fixed decay": (kernels.diagonal_scan, "fixed", {"packing": True}),
    "scan, complex": (kernels.diagonal_scan, "complex", {"packing": True}),
    "a token a rank": (DELTA, "head", {"lengths": (1, 1, 1, 1), "packing": True}),
    "an empty rank": (DELTA, "head", {"lengths": (3, 0, 5, 4)}),
}
for _name, (_run, _kind, _options) in RECURRENCE.items():
    case(f"recurrence: {_name}")(lambda *at, o=(_run, _kind, _options): ring_recurrence(*at, o[0], o[1], **o[2]))


@case("recurrence: alone", ranks=(1,))
def recurrence_alone(*at):
    ring_recurrence(*at, DELTA, "head", packing=True)


@case("recurrence: a document over many ranks", ranks=(4,))
def recurrence_documents(rank, ranks, group):
    """Document 1 begins on rank 0 and ends on rank 3; rank 2 holds nothing but padding."""
    numbers = torch.tensor([[0, 0, 1, 1, 1, -1, 1, 1, -1, -1, -1, -1, -1, 1, 2, 2]])
    x = torch.randn(1, 16, 1)
    decay = torch.full((1, 16, 1), 0.5)
    want, last = kernels.diagonal_scan(decay, x, state=torch.ones(1, 1), segments_BT=numbers)
    at = slice(4 * rank, 4 * rank + 4)
    y, state = kernels.ring_recurrence(
        kernels.diagonal_scan, decay[:, at], x[:, at], group=group, state=torch.ones(1, 1), segments_BT=numbers[:, at]
    )
    close(y, want[:, at])
    if rank == 3:
        close(state, last)


@case("recurrence: Triton", ranks=(2,))
def recurrence_triton(*at):
    ring_recurrence(*at, DELTA, "head", form="triton", lengths=(20, 17), rows=1, packing=True)


@case("recurrence: compiled", ranks=(2,))
def recurrence_compiled(*at):
    for run, kind in ((DELTA, "head"), (kernels.diagonal_scan, "")):
        torch.compiler.reset()
        compiled = lambda call: torch.compile(call, fullgraph=True, backend="aot_eager")  # noqa: E731
        ring_recurrence(*at, run, kind, make=compiled, packing=True)


@case("recurrence: torch's own check", ranks=(2,))
def recurrence_checked(rank, ranks, group):
    transition, offset, state = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    args = [x.requires_grad_() for x in (transition, offset, state)]
    torch.library.opcheck(recurrence._pass._opoverload, (*args, group.group_name, True))
    torch.library.opcheck(recurrence._carried._opoverload, (torch.zeros(2, 3, dtype=torch.int64), group.group_name))


@case("recurrence: mistakes")
def recurrence_mistakes(rank, ranks, group):
    x = torch.randn(1, 4, 2)
    scan = kernels.diagonal_scan
    raises(TypeError, "by position", lambda: kernels.ring_recurrence(scan, x, x=x, group=group))
    raises(ValueError, "run must be one of", lambda: kernels.ring_recurrence(kernels.attention, x, group=group))
    raises(TypeError, "group", lambda: kernels.ring_recurrence(scan, x, x, group=7))
    raises(TypeError, "segments_BT", lambda: kernels.ring_recurrence(scan, x, x, group=group, segments_BT=x[..., 0]))
    raises(ValueError, "state must be", lambda: kernels.ring_recurrence(scan, x, x, group=group, state=x[:, 0, :1]))
    wide = torch.ones(1 + (rank == 1), 4, 2)
    raises(ValueError, "dimension 0 of the state", lambda: kernels.ring_recurrence(scan, wide, wide, group=group))


@case("recurrence: broken on purpose", ranks=(3,))
def recurrence_broken(*at):
    """A transition of 1, a document taken for another, a gradient that stays at home: all are seen."""
    enters, carried = recurrence._pass, recurrence._carried
    for name, broken in (
        ("_pass", lambda transition, *rest: enters(torch.ones_like(transition), *rest)),
        ("_pass", lambda transition, offset, *rest: enters(transition, offset.detach(), *rest)),
        ("_carried", lambda segments, group: carried(segments, group) * 0),
    ):
        right = getattr(recurrence, name)
        setattr(recurrence, name, broken)
        try:
            ring_recurrence(*at, LINEAR, "head", packing=True, lengths=(6, 6, 6))
        except AssertionError:
            pass
        else:
            raise AssertionError(f"nobody saw a wrong {name}")
        finally:
            setattr(recurrence, name, right)


def main(rank, folder):
    global current
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(place, name, poisoned(getattr(place, name)))
    op.FORM = ""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    groups = {ranks: dist.new_group(range(ranks)) for ranks in range(1, RANKS + 1)}
    with open(folder / f"{rank}.jsonl", "w") as results:
        for ranks, group in groups.items():
            current = group
            for name, (where, run) in CASES.items():
                if rank >= ranks or ranks not in where:
                    continue
                torch.manual_seed(0)
                error = ""
                try:
                    run(rank, ranks, group)
                except Exception:
                    error = traceback.format_exc()
                print(json.dumps([ranks, name, error]), file=results, flush=True)
                if error:
                    sys.exit(1)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
