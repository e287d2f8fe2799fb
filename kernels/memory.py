"""A matrix memory in chunks, for CPUs: whole-tensor work inside all chunks at once, and a short loop between them.

One form serves linear attention, the gated and the generalised delta rule. With every decay from the chunk's start
(rows: q, a) or to its end (columns: k, b) multiplied in, and S the memory where the chunk begins,

    r = a S + (v beta | pairs(a, k) v)           what is asked of the memory
    u = r + pairs(a, b) u                        a triangular system: u = T r
    y = q S + pairs(q, k) v + pairs(q, b) u
    S' = across S + k^T v + b^T u

Linear attention has no a, b, u. The delta rule (beta given) has no k, v of its own: b is its key and a = -beta b.
A document's start and padding are masks on the factors. A long sequence goes span by span, so that what the chunks of
a span need stays in a core's cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import recurrence, segments
from kernels.chunks import FLOOR, STEPS, documents, join, split
from kernels.decays import decays

SPAN = 2**19  # numbers of a tensor that are worked on at a time


def chunk(tokens: int, size: int) -> int:
    """Tokens of a chunk: more of them than keys are wide cost more inside than they save between, and make an
    ill-conditioned system where little decays."""
    return 16 if tokens <= 16 or size <= 16 else 32 if tokens <= 32 or size <= 32 else 64


def empty(q: Tensor, v: Tensor, keep: int, reads: bool) -> tuple[Tensor, ...]:
    """What `run` returns, unwritten."""
    y, state = recurrence.empty(q, v, keep)
    rows, tokens, heads, size = q.shape
    if keep or tokens <= STEPS:
        return y, state, *(state.new_empty(0) for _ in range(3 if reads else 1))
    c = chunk(tokens, size)
    n = (tokens + c - 1) // c
    starts = state.new_empty(rows, heads, n, size, v.shape[3])
    if not reads:
        return y, state, starts
    return y, state, starts, state.new_empty(rows, heads, n, c, v.shape[3]), state.new_empty(rows, heads, n, c, c)


@dataclass
class Tokens:
    """Inputs in one wide dtype, q scaled, and padding without effect: k, b and decay 0."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    a: Tensor | None
    b: Tensor | None
    beta: Tensor | None
    state: Tensor
    number_BT: Tensor | None  # `segments.filled`
    real_BT: Tensor | None
    chunk: int

    @classmethod
    def of(cls, q, k, v, decay, a, b, beta, state, segments_BT, scale) -> "Tokens":
        wide = torch.promote_types(v.dtype, torch.float32)
        rows, tokens, heads, size = q.shape
        q, k, v = q.to(wide) * scale, k.to(wide), v.to(wide)
        decay = v.new_zeros(rows, tokens, heads) if decay is None else decay.to(wide).clamp(min=FLOOR)
        a, b, beta = (None if x is None else x.to(wide) for x in (a, b, beta))
        real_BT = None if segments_BT is None else segments_BT >= 0
        if real_BT is not None:
            k, b, decay = (None if x is None else keep_real(x, real_BT) for x in (k, b, decay))
        state = v.new_zeros(rows, heads, size, v.shape[3]) if state is None else state.to(wide)
        number_BT = None if segments_BT is None else segments.filled(segments_BT)
        return cls(q, k, v, decay, a, b, beta, state, number_BT, real_BT, chunk(tokens, size))

    @property
    def reads(self) -> bool:
        return self.a is not None or self.beta is not None

    def spans(self, tokens: int) -> Iterator[slice]:
        """Stretches of whole chunks, of the first `tokens` columns."""
        rows, _, heads, size = self.q.shape
        each = rows * heads * max(size, self.v.shape[3], self.chunk) * self.chunk  # numbers of a chunk
        length = max(1, SPAN // max(1, each)) * self.chunk
        for start in range(0, tokens, length):
            yield slice(start, min(start + length, tokens))

    def part(self, span: slice, state: Tensor) -> "Tokens":
        """The columns of a span, before which the memory is `state`."""
        fixed = {"state": state, "chunk": self.chunk}
        if self.number_BT is not None and span.start:
            # The document that goes on is number 0 again.
            number_BT = self.number_BT[:, span] - self.number_BT[:, span.start - 1 : span.start]
            fixed["number_BT"] = number_BT
        whole = span.start == 0 and span.stop == self.q.shape[1]
        cut = {n: x if x is None or whole else x[:, span] for n, x in vars(self).items() if n not in fixed}
        return Tokens(**cut, **fixed)


class Inside:
    """All that is known of every chunk before the memory is: tensors (B, H, n, C, ...)."""

    def __init__(self, x: Tokens) -> None:
        self.size = x.chunk
        self.q, self.k, self.v = (split(y, self.size) for y in (x.q, x.k, x.v))
        self.beta = None if x.beta is None else split(x.beta, self.size)
        self.rows, self.columns = [self.q], [self.k]
        if x.beta is not None:
            self.rows.append(-self.beta[..., None] * self.k)
        elif x.reads:
            self.rows.append(split(x.a, self.size))
            self.columns.append(split(x.b, self.size))
        masks = None if x.number_BT is None else documents(x.number_BT, self.size)
        self.decays = decays(split(x.decay, self.size), masks, lag=x.a is not None)
        self.products = self.decays.products(self.rows, self.columns)
        self.pairs, self.since, self.until = self.products

    def solver(self) -> Tensor:
        """T = (1 - pairs(a, b))^-1."""
        one = torch.eye(self.size, dtype=self.q.dtype, device=self.q.device)
        system = -self.pairs[1][-1]
        return torch.linalg.solve_triangular(system, one.expand_as(system), upper=False, unitriangular=True)

    def asked(self) -> Tensor:
        """r without what the memory answers."""
        return self.v * self.beta[..., None] if self.beta is not None else self.pairs[1][0] @ self.v


def run(q, k, v, decay, a, b, beta, state, segments_BT, scale, keep) -> tuple[Tensor, ...]:
    """y, the state after, and for `grad` the memories at the chunks' starts and, where the memory is read, u and T."""
    x = Tokens.of(q, k, v, decay, a, b, beta, state, segments_BT, scale)
    tokens = q.shape[1]
    walked = tokens if tokens <= STEPS else keep
    outputs, moments, memory, parts = [], [], x.state, []
    for span in x.spans(tokens - walked):
        y, memory, *part = _chunks(x.part(span, memory))
        outputs.append(y)
        parts.append(part)
    if walked or not parts:
        saved = [memory.new_empty(0) for _ in range(3 if x.reads else 1)]
    else:
        saved = [part[0] if len(part) == 1 else torch.cat(part, 2) for part in zip(*parts, strict=True)]
    begins_BT = None if x.number_BT is None else segments.begins(x.number_BT)
    for t in range(tokens - walked, tokens + 1):
        if t >= tokens - keep:
            moments.append(memory)
        if t < tokens:
            if begins_BT is not None:
                memory = torch.where(begins_BT[:, t, None, None, None], 0, memory)
            memory = _step(x, t, memory)
            outputs.append((x.q[:, t, :, None] @ memory).transpose(1, 2))
    y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0] if outputs else x.v
    y = y if x.real_BT is None else keep_real(y, x.real_BT)
    after = torch.stack(moments, 1) if keep else moments[0]
    return y.to(v.dtype), after, *saved


def _step(x: Tokens, t: int, memory: Tensor) -> Tensor:
    gate = recurrence.gate(x.decay, t)
    k, v = x.k[:, t, :, :, None], x.v[:, t, :, None]
    if x.beta is not None:
        memory = memory * gate
        return memory + x.beta[:, t, :, None, None] * k * (v - k.mT @ memory)
    if x.reads:
        return memory * gate + x.b[:, t, :, :, None] * (x.a[:, t, :, None] @ memory) + k * v
    return memory * gate + k * v


def _chunks(x: Tokens) -> tuple[Tensor, ...]:
    c = Inside(x)
    pairs, (since, until), across, memory = c.pairs, (c.since, c.until), c.decays.across, x.state
    starts, us = [], []
    # unbind, not indexing: its gradient is one stack, where each index would fill a whole tensor with zeros.
    if x.reads:
        solver = c.solver()
        found, asks = (solver @ c.asked()).unbind(2), (solver @ since[1]).unbind(2)  # u = found + asks S
    writes = None if x.beta is not None else (until[0].mT @ c.v).unbind(2)
    for n, (across_n, b_n) in enumerate(zip(across.unbind(2), until[-1].mT.unbind(2), strict=True)):
        starts.append(memory)
        memory = across_n * memory
        if x.reads:
            us.append(found[n] + asks[n] @ starts[n])
            memory = memory + b_n @ us[n]
        if writes is not None:
            memory = memory + writes[n]
    starts = torch.stack(starts, 2)
    y = since[0] @ starts
    if x.beta is None:
        y = y + pairs[0][0] @ c.v
    saved = (starts,)
    if x.reads:
        u = torch.stack(us, 2)
        y = y + pairs[0][-1] @ u
        saved = (starts, u, solver)
    return join(y, x.q.shape[1]), memory, *saved


def grad(args, saved, grads) -> dict[str, Tensor]:
    """Gradients by name of all of `run`'s tensors, those that came as None aside. For calls with `saved` and no keep.

    With the gradient D of the memory where a chunk ends: du = pairs(q, b)^T dy + b D; dr = T^T du; the gradient of
    the memory where it begins is across D + q^T dy + a^T dr, and the system's own is dr u^T, with no inverse in it.
    """
    q, k, v, decay, a, b, beta, state, segments_BT, scale, _ = args
    x = Tokens.of(*args[:10])
    dy, dmemory = (g.to(x.q.dtype) for g in grads)
    dy = dy if x.real_BT is None else keep_real(dy, x.real_BT)
    parts = []
    for span in reversed(list(x.spans(q.shape[1]))):
        chunks = slice(span.start // x.chunk, -(-span.stop // x.chunk))
        kept = [s[:, :, chunks] for s in saved]
        found, dmemory = _unchunk(x.part(span, kept[0][:, :, 0]), kept, dy[:, span], dmemory, scale)
        parts.append(found)
    found = {
        name: parts[0][name] if len(parts) == 1 else torch.cat([p[name] for p in parts[::-1]], 1) for name in parts[0]
    }
    if x.real_BT is not None:
        found |= {name: keep_real(found[name], x.real_BT) for name in ("k", "b", "decay") if name in found}
    found["state"] = dmemory
    given = {"q": q, "k": k, "v": v, "decay": decay, "a": a, "b": b, "beta": beta, "state": state}
    return {name: g.to(given[name].dtype) for name, g in found.items() if given[name] is not None}


def _unchunk(x: Tokens, saved: list[Tensor], dy: Tensor, dmemory: Tensor, scale: float) -> tuple[dict, Tensor]:
    """Gradients of a span's tokens, and of the memory before it, from those of its y and of the memory after."""
    c = Inside(x)
    starts, u, solver = (*saved, None, None)[:3]
    dy = split(dy, c.size)
    pairs, (since, until), across = c.pairs, (c.since, c.until), c.decays.across.unbind(2)
    given = (since[0].mT @ dy).unbind(2)
    if x.reads:
        found, asks, bs = (y.unbind(2) for y in (pairs[0][-1].mT @ dy, solver @ since[1], until[-1]))
    ends, dus = [], []
    for n in reversed(range(len(across))):
        ends.append(dmemory)
        dmemory = across[n] * dmemory + given[n]
        if x.reads:
            dus.append(found[n] + bs[n] @ ends[-1])
            dmemory = dmemory + asks[n].mT @ dus[-1]
    ends = torch.stack(ends[::-1], 2)
    dv = 0
    if x.beta is None:
        dv = pairs[0][0].mT @ dy + until[0] @ ends
    dacross = (starts * ends).sum(-1)
    dsince, duntil, dpairs = [dy @ starts.mT], [], [[]]
    values = [c.v] if x.beta is None else []
    if x.reads:
        dr = solver.mT @ torch.stack(dus[::-1], 2)
        dv = dv + (dr * c.beta[..., None] if x.beta is not None else pairs[1][0].mT @ dr)
        dsince.append(dr @ starts.mT)
        values.append(u)
        dpairs.append([])
    for value in values:
        duntil.append(value @ ends.mT)
        dpairs[0].append(dy @ value.mT)
        if x.reads:
            dpairs[1].append(dr @ value.mT)
    drows, dcolumns, ddecay = c.decays.grad(c.rows, c.columns, c.products, dpairs, dsince, duntil, dacross)
    found = {"q": drows[0] * scale, "k": dcolumns[0], "v": dv, "decay": ddecay}
    if x.beta is not None:
        found["k"] = dcolumns[0] - c.beta[..., None] * drows[1]
        found["beta"] = (dr * c.v).sum(-1) - (drows[1] * c.k).sum(-1)
    elif x.reads:
        found |= {"a": drows[1], "b": dcolumns[1]}
    return {name: join(g, x.q.shape[1]) for name, g in found.items()}, dmemory


def keep_real(x: Tensor, real_BT: Tensor) -> Tensor:
    """x (B, T, ...) with 0 at padding."""
    return torch.where(real_BT.view(*real_BT.shape, *[1] * (x.dim() - 2)), x, 0)
