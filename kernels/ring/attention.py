"""Softmax attention over a sequence that is sharded over ranks (ring attention, arXiv 2310.01889).

At step s a rank reads the keys and values of the rank s before it. They come straight from there, and only the pieces
that its queries can see; those of step s + 1 travel while step s is computed. Blocks add up by their lse (see
`kernels.attention.partial`); in backward the gradients of keys and values go home as soon as they are made.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import check, op
from kernels.attention.partial import attend, attend_grad, delta_of, merge
from kernels.ring import exchange
from kernels.ring.layout import BALANCES, pieces, positions

NAME = "ring_attention"


def ring_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    group: dist.ProcessGroup | str,
    *,
    scale: float | None = None,
    window: int = 0,
    mask: str = "causal",
    segments_BT: Tensor | None = None,
    balance: str = "zigzag",
) -> Tensor:
    """`kernels.attention` without a past, of which each rank of `group` gives and gets its shard of the sequence.

    q (B, T, H, K), k (B, T, G, K), v (B, T, G, V): the T tokens that `shard(whole, rank, ranks, balance)` gives a rank,
    T the same on every rank, and even with balance="zigzag"; what does not divide is padded by the caller, -1 in
    segments. Every rank of the group makes the call, and where gradients are taken runs backward, in the same order.
    segments_BT: this rank's shard of the documents' numbers, which do not fall along the sequence; -1 is padding.
    mask, window, scale: as of `kernels.attention`. balance: "contiguous" for mask="full" and short windows.
    Returns y (B, T, H, V) in q's dtype, 0 at padding. No gradients of gradients. Raises ValueError or TypeError naming
    the argument, ValueError also where ranks differ (on a GPU, in the first call of a shape).
    """
    check.shape(NAME, "q_BTHK", q_BTHK, (None, None, None, None), "(B, T, H, K)")
    check.floating(NAME, "q_BTHK", q_BTHK)
    rows, tokens, heads, size = q_BTHK.shape
    start = f"(B={rows}, T={tokens}, G"
    check.shape(NAME, "k_BTGK", k_BTGK, (rows, tokens, None, size), f"{start}, K={size})")
    groups = k_BTGK.shape[2]
    check.shape(NAME, "v_BTGV", v_BTGV, (rows, tokens, groups, None), f"{start}={groups}, V)")
    if groups == 0 or heads % groups:
        raise ValueError(f"{NAME}: H={heads} of q_BTHK must be a multiple of G={groups} of k_BTGK")
    for name, x in (("k_BTGK", k_BTGK), ("v_BTGV", v_BTGV)):
        check.dtype(NAME, name, x, q_BTHK.dtype)
        check.device(NAME, name, x, q_BTHK)
    check.window(NAME, window)
    if mask not in ("causal", "full"):
        raise ValueError(f"{NAME}: mask={mask!r} must be 'causal' or 'full'")
    if balance not in BALANCES:
        raise ValueError(f"{NAME}: balance={balance!r} must be {' or '.join(map(repr, BALANCES))}")
    if balance == "zigzag" and tokens % 2:
        raise ValueError(f"{NAME}: T={tokens} of q_BTHK must be even with balance='zigzag', two pieces of one length")
    check.segments(NAME, segments_BT, rows, tokens)
    if segments_BT is not None:
        check.device(NAME, "segments_BT", segments_BT, q_BTHK)
    scale = size**-0.5 if scale is None else float(scale)
    name = exchange.name_of(NAME, group)
    return _op(q_BTHK, k_BTGK, v_BTGV, segments_BT, name, scale, window, mask == "causal", balance)[0]


@dataclass(frozen=True)
class Ring:
    """One rank's side of one call; T tokens on every rank."""

    group: dist.ProcessGroup
    tokens: int
    window: int
    causal: bool
    balance: str

    @property
    def ranks(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def before(self, step: int) -> int:
        """The rank whose keys this one reads at `step`."""
        return (self.rank - step) % self.ranks

    def behind(self, step: int) -> int:
        """The rank that reads this one's keys at `step`."""
        return (self.rank + step) % self.ranks

    def meet(self, reader: int, owner: int) -> tuple[slice, slice] | None:
        """The queries of `reader` and the keys of `owner` that hold all pieces that see each other; None: no piece."""
        ours, theirs = (pieces(rank, self.ranks, self.balance) for rank in (reader, owner))
        size = self.tokens // len(ours)
        seen = [(i, j) for i, a in enumerate(ours) for j, b in enumerate(theirs) if self._sees(a, b, size)]
        if not seen:
            return None
        return tuple(slice(min(at) * size, (max(at) + 1) * size) for at in zip(*seen, strict=True))

    def _sees(self, queries: int, keys: int, size: int) -> bool:
        near = (queries - keys) * size  # between tokens of equal places; others differ by less than `size`
        return not (self.causal and near < 0) and not (self.window and near - max(size, 1) + 1 >= self.window)

    def places(self, rank: int, columns: slice, like: Tensor) -> Tensor:
        """Positions (B, n) of a rank's columns."""
        at = positions(rank, self.ranks, self.tokens, self.balance, like.device)[columns]
        return at.expand(like.shape[0], -1)


class Keys:
    """Keys, values and documents' numbers of all ranks, one rank a step, the next on its way."""

    def __init__(self, ring: Ring, *own: Tensor | None) -> None:
        self.ring, self.own = ring, own
        self.coming = None

    def at(self, step: int) -> list[Tensor | None]:
        """Those of the rank before, cut to what is seen; called for each step in order, also where nothing is."""
        come, self.coming = self.coming, self._start(step + 1)
        if step == 0:
            return list(self.own)
        arrived = iter(come.wait())
        return [None if x is None else next(arrived, None) for x in self.own]

    def _start(self, step: int) -> exchange.Exchange | None:
        ring = self.ring
        if step == ring.ranks:
            return None
        given, taken = ring.meet(ring.behind(step), ring.rank), ring.meet(ring.rank, ring.before(step))
        own = [x for x in self.own if x is not None]
        sends = [(ring.behind(step), x[:, given[1]]) for x in own] if given else []
        receives = [(ring.before(step), _room(x, taken[1])) for x in own] if taken else []
        return exchange.Exchange(ring.group, sends, receives)


def forward(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    segments_BT: Tensor | None,
    group: str,
    scale: float,
    window: int,
    causal: bool,
    balance: str,
) -> tuple[Tensor, Tensor]:
    """y, and lse for `grad`."""
    rows, tokens, heads, size = q_BTHK.shape
    ring = Ring(exchange.resolve(group), tokens, window, causal, balance)
    sizes = {"B": rows, "T": tokens, "H": heads, "G": k_BTGK.shape[2], "K": size, "V": v_BTGV.shape[3]}
    options = {"segments_BT (given or not)": segments_BT is not None, "mask": causal, "window": window}
    bits = torch.finfo(q_BTHK.dtype).bits
    kinds = {"bits of a number": bits, "balance": BALANCES.index(balance), **options}
    exchange.agree(NAME, ring.group, q_BTHK.device, **sizes, **{n: int(x) for n, x in kinds.items()})
    keys = Keys(ring, k_BTGK, v_BTGV, segments_BT)
    y = lse = None
    for step in range(ring.ranks):
        k, v, inside = keys.at(step)
        met = ring.meet(ring.rank, ring.before(step))
        if met is None:
            continue
        queries, columns = met
        q, q_in = q_BTHK[:, queries], None if inside is None else segments_BT[:, queries]
        at = ring.places(ring.rank, queries, q), ring.places(ring.before(step), columns, q)
        part, part_lse = attend(q, k, v, *at, q_in, inside, scale, window, causal)
        if step == 0:  # a rank sees all of its own pieces
            y, lse = part, part_lse
        else:
            merge(y[:, queries], lse[:, queries], part, part_lse)
    return y.to(q_BTHK.dtype), lse


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """The same round, with the gradients of each block of keys sent to its owner while the next one is computed."""
    q_BTHK, k_BTGK, v_BTGV, segments_BT, group, scale, window, causal, balance = args
    (y, lse), (dy,) = outputs, grads
    ring = Ring(exchange.resolve(group), q_BTHK.shape[1], window, causal, balance)
    keys = Keys(ring, k_BTGK, v_BTGV, segments_BT)
    delta = delta_of(dy, y)
    dq = dk = dv = None
    home, homes = None, None  # gradients of our keys under way to us, and which keys those are
    for step in range(ring.ranks):
        k, v, inside = keys.at(step)
        met, sends = ring.meet(ring.rank, ring.before(step)), []
        if met is not None:
            queries, columns = met
            q, q_in = q_BTHK[:, queries], None if inside is None else segments_BT[:, queries]
            at = ring.places(ring.rank, queries, q), ring.places(ring.before(step), columns, q)
            share = (x[:, queries] for x in (lse, delta, dy))
            part, *found = attend_grad(q, k, v, *at, q_in, inside, scale, window, causal, *share)
            if step == 0:
                dq, (dk, dv) = part, found
            else:
                dq[:, queries] += part
                sends = [(ring.before(step), x) for x in found]
        if home is not None:
            _add((dk, dv), homes, home.wait())
        theirs = ring.meet(ring.behind(step), ring.rank) if step else None
        homes = None if theirs is None else theirs[1]
        receives = [] if homes is None else [(ring.behind(step), _room(x, homes)) for x in (dk, dv)]
        home = exchange.Exchange(ring.group, sends, receives)
    _add((dk, dv), homes, home.wait())
    found = (x.to(arg.dtype) for x, arg in zip((dq, dk, dv), args[:3], strict=True))
    return [x for x, need in zip(found, needs[:3], strict=True) if need]


def _room(x: Tensor, columns: slice) -> Tensor:
    """For those columns of another rank's `x`."""
    return x.new_empty(x.shape[0], columns.stop - columns.start, *x.shape[2:])


def _add(sums, columns: slice | None, parts: list[Tensor]) -> None:
    for total, part in zip(sums, parts, strict=False):
        total[:, columns] += part


def _fake(q_BTHK, k_BTGK, v_BTGV, segments_BT, group, scale, window, causal, balance):
    y = q_BTHK.new_empty(*q_BTHK.shape[:3], v_BTGV.shape[3])
    return y, q_BTHK.new_empty(q_BTHK.shape[:3], dtype=torch.float64)


def _once(*args):
    raise NotImplementedError(f"{NAME} has no gradients of gradients: take them of kernels.attention on one rank")


_op = op.register(NAME, forward, _fake, grad=grad, saved=1, twice=_once, whole=True)
