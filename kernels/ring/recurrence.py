"""Linear recurrences over a sequence that is sharded over ranks: every rank works on its tokens at the same time.

The state after a shard is an affine function of the state S before it, A S + b. Each rank finds A and b of its tokens,
one state goes round the ring, S -> A S + b, and from what reaches a rank it has its outputs. So all work that grows
with tokens is parallel, what is sequential is one small product a rank, and the state travels once (its gradient once,
the other way). arXiv 2404.02882 sends the state so, for linear attention. A and b cost about as much again as the op
itself, so that it takes three ranks and more to gain time; two gain memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import check, op, segments
from kernels.diagonal_scan import diagonal_scan
from kernels.gated_delta import gated_delta
from kernels.generalized_delta import generalized_delta
from kernels.linear_attention import linear_attention
from kernels.ring import exchange

NAME = "ring_recurrence"


def ring_recurrence(
    run: Callable,
    *args: Tensor | None,
    group: dist.ProcessGroup | str,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
    **options,
) -> tuple[Tensor, Tensor]:
    """`run(*args, ...)`, of which each rank of `group` gives and gets its shard of the sequence, in order of ranks.

        y, state = ring_recurrence(kernels.gated_delta, q, k, v, decay, beta, group=group, state=state)

    run: linear_attention, gated_delta, generalized_delta or diagonal_scan, its tensors by position, `options` its own.
    Shards may differ in length and may be empty. Every rank of the group makes the call, and where gradients are taken
    runs backward, in the same order.
    state: before the first token, read on the first rank alone; on the others it may be left out, and has gradient 0.
    segments_BT: this rank's shard of the whole sequence's: 0 what `state` carries, n the n-th document, -1 padding.
    keep: as of the op, of this rank's tokens; no shard may be shorter.
    Returns y of this rank's tokens and the state after them: the last rank's is the state after the whole sequence.
    No gradients of gradients. Raises ValueError or TypeError naming the argument.
    """
    if run not in RULES:
        raise ValueError(f"{NAME}: run must be one of {', '.join(f.__name__ for f in RULES)}, got {run!r}")
    if len(args) < 2:
        raise TypeError(f"{NAME}: the tensors of {run.__name__} go by position, got {len(args)} so")
    rule, group = RULES[run], exchange.name_of(NAME, group)
    if segments_BT is not None:
        check.segments(NAME, segments_BT, *args[1].shape[:2])
        check.device(NAME, "segments_BT", segments_BT, args[1])
        carried_B1 = _carried(segments_BT, group)[:, None]
        segments_BT = torch.where(segments_BT < 0, -1, segments_BT - carried_B1)
    transition, offset, finish = rule.affine(run, args, segments_BT, keep, options)
    if state is not None:  # before anything is sent
        check.shape(NAME, "state", state, tuple(offset.shape), f"{tuple(offset.shape)}")
        check.device(NAME, "state", state, offset)
    return finish(_pass(transition, offset, state, group, rule.matrix))


@dataclass(frozen=True)
class Rule:
    """What is particular to an op.

    affine: (run, args, segments, keep, options) -> A, b, and what makes y and the state after of the state before.
    matrix: A S is a product of matrices, else elementwise.
    """

    affine: Callable[..., tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]]
    matrix: bool = False


def _by_decay(run, args, segments_BT, keep, options):
    """linear_attention: A is the product of all gates, 0 where a document begins; the op runs again from S."""
    _, offset = run(*args, segments_BT=segments_BT, **options)
    decay = args[3] if len(args) > 3 else options.get("decay")
    if decay is None:
        total = offset.new_zeros(*offset.shape[:2], 1, 1)
    else:
        decay = decay.to(offset.dtype)
        if segments_BT is not None:
            decay = torch.where((segments_BT >= 0).view(*segments_BT.shape, *[1] * (decay.dim() - 2)), decay, 0)
        total = decay.sum(1)[..., None]
        total = total[..., None] if decay.dim() == 3 else total
    transition = total.exp()
    if segments_BT is not None:
        ended_B = (segments.filled(segments_BT) > 0).any(1)
        transition = torch.where(ended_B[:, None, None, None], 0, transition)

    def finish(entering: Tensor) -> tuple[Tensor, Tensor]:
        return run(*args, state_BHKV=entering, segments_BT=segments_BT, keep=keep, **options)

    return transition, offset, finish


def _by_identity(run, args, segments_BT, keep, options):
    """A delta rule: A is what a shard with values of 0 makes of the identity, run beside what it makes of nothing.

    So are the outputs: those of S are those of the identity times S, and the op runs once.
    """
    q, k, v, *rest = args
    rows, _, heads, size = k.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    one = torch.eye(size, dtype=wide, device=v.device).expand(rows, heads, -1, -1)
    state = torch.cat([one.new_zeros(rows, heads, size, v.shape[3]), one], -1)
    values = torch.cat([v, torch.zeros_like(k, dtype=v.dtype)], -1)
    both, after = run(q, k, values, *rest, state_BHKV=state, segments_BT=segments_BT, keep=keep, **options)
    y_BTHV, unit_BTHK = both.to(wide).split([v.shape[3], size], -1)
    offsets, transitions = after.split([v.shape[3], size], -1)

    def finish(entering: Tensor) -> tuple[Tensor, Tensor]:
        y = y_BTHV + (unit_BTHK.transpose(1, 2) @ entering).transpose(1, 2)
        return y.to(v.dtype), offsets + transitions @ (entering[:, None] if keep else entering)

    return _last(transitions, keep), _last(offsets, keep), finish


def _by_ones(run, args, segments_BT, keep, options):
    """diagonal_scan: as a delta rule, with ones for the identity."""
    decay, x = args
    h, offsets = run(decay, x, segments_BT=segments_BT, keep=keep, **options)
    ones = torch.ones_like(_last(offsets, keep))
    unit, transitions = run(decay, torch.zeros_like(x), state=ones, segments_BT=segments_BT, keep=keep, **options)

    def finish(entering: Tensor) -> tuple[Tensor, Tensor]:
        state = entering[:, None]
        return (h + unit * state).to(x.dtype), offsets + transitions * (state if keep else entering)

    return _last(transitions, keep), _last(offsets, keep), finish


def _last(moments: Tensor, keep: int) -> Tensor:
    return moments[:, -1] if keep else moments


RULES = {
    linear_attention: Rule(_by_decay),
    gated_delta: Rule(_by_identity, matrix=True),
    generalized_delta: Rule(_by_identity, matrix=True),
    diagonal_scan: Rule(_by_ones),
}


def _entering(transition: Tensor, offset: Tensor, state: Tensor | None, group: str, matrix: bool) -> Tensor:
    """The state before this rank's tokens."""
    ring = exchange.resolve(group)
    sizes = {f"dimension {i} of the state": n for i, n in enumerate(offset.shape)}
    exchange.agree(NAME, ring, offset.device, dimensions=offset.dim(), bits=torch.finfo(offset.dtype).bits)
    exchange.agree(NAME, ring, offset.device, **sizes)
    entering = torch.zeros_like(offset) if state is None else state.to(offset.dtype, copy=True)
    if ring.rank() > 0:
        (entering,) = exchange.Exchange(ring, [], [(ring.rank() - 1, torch.empty_like(entering))]).wait()
    if ring.rank() + 1 < ring.size():
        leaving = (transition @ entering if matrix else transition * entering) + offset
        exchange.Exchange(ring, [(ring.rank() + 1, leaving)], []).wait()
    return entering


def _entering_grad(args, outputs, grads, needs) -> list[Tensor]:
    """The gradient of the state that leaves comes from the next rank, that of the one that enters goes to the last."""
    transition, offset, state, group, matrix = args
    ring, (entering,), (total,) = exchange.resolve(group), outputs, grads
    after = torch.zeros_like(entering)
    if ring.rank() + 1 < ring.size():
        (after,) = exchange.Exchange(ring, [], [(ring.rank() + 1, torch.empty_like(after))]).wait()
    across = transition.mH @ after if matrix else transition.conj() * after
    total = total + across
    if ring.rank() > 0:
        exchange.Exchange(ring, [(ring.rank() - 1, total)], []).wait()
        total = torch.zeros_like(total)
    made = (
        lambda: after @ entering.mH if matrix else (after * entering.conj()).sum_to_size(transition.shape),
        lambda: after,
        lambda: total.to(state.dtype),
    )
    return [make() for make, need in zip(made, needs[:3], strict=True) if need]


def _entering_fake(transition, offset, state, group, matrix):
    return torch.empty_like(offset, memory_format=torch.contiguous_format)


def _once(*args):
    raise NotImplementedError(f"{NAME} has no gradients of gradients: take them of the op itself on one rank")


def _last_number(segments_BT: Tensor, group: str) -> Tensor:
    """Number of the document that the ranks before this one ended with, (B,)."""
    ring = exchange.resolve(group)
    zero_B1 = segments_BT.new_zeros(segments_BT.shape[0], 1)
    every = exchange.gather(torch.cat([zero_B1, segments_BT], 1).amax(1), ring)
    return torch.cat([zero_B1.T, every[: ring.rank()]]).amax(0)


def _last_number_fake(segments_BT, group):
    return segments_BT.new_empty(segments_BT.shape[0])


_pass = op.register("ring_recurrence", _entering, _entering_fake, grad=_entering_grad, twice=_once, whole=True)
_carried = op.register("ring_carried", _last_number, _last_number_fake, differentiable=False)
