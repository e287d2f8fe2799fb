"""Softmax attention for CPUs: torch's fused kernel on blocks of queries, each against the keys it can reach.

Without packing, window or past there is one block and no mask. Otherwise a block of queries reads one range of
columns, [past | new], as short as its documents and window allow, and a boolean mask says the rest. Of a past only
the slots up to the longest length are read. Backward goes over the same blocks, so no T x T mask exists there either.
What the fused kernel cannot do (a soft cap, slopes, sinks) is written out, one block's logits at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels import cpu, segments
from kernels.attention.view import ancestors, slot_index

BLOCK = 256  # queries that share a mask
FEW = 32  # tokens of a decode step, a draft with it: C++ then reads a past in place
GRAD_BLOCK = 128  # in backward, which holds the weights of a block


def chunked(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    length_B: Tensor | None,
    positions_BT: Tensor | None,
    segments_BT: Tensor | None,
    table_BN: Tensor | None,
    slopes_H: Tensor | None,
    sinks_H: Tensor | None,
    parents_BT: Tensor | None,
    scale: float,
    window: int,
    causal: bool,
    softcap: float,
) -> Tensor:
    """y (B, T, H, V); as `reference`."""
    args = (q_BTHK, k_BTGK, v_BTGV, past_k, past_v, length_B, positions_BT, segments_BT, table_BN)
    extra = (slopes_H, sinks_H, parents_BT, scale, window)
    if past_k is not None and causal and q_BTHK.shape[1] <= FEW and cpu.serves(*args[:5]):
        return torch.ops.edifice_cpu.attention(*args, *extra, softcap)
    return _run(*args, *extra, causal, softcap)


def twice(*args) -> Tensor:
    """`chunked` in operations that autograd can differentiate any number of times."""
    with sdpa_kernel(SDPBackend.MATH):
        return _run(*args)


def _run(
    q, k, v, past_k, past_v, length, positions, numbers, table, slopes, sinks, parents, scale, window, causal, softcap
) -> Tensor:
    if 0 in q.shape[:3]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    q, k, v = (silence(x, numbers) for x in (q, k, v))
    extra = Extra(softcap, _per_group(slopes, k), _per_group(sinks, k))
    reach = _reach(q, past_k, length, positions, numbers, table, parents, window, causal, BLOCK, extra.none)
    keys, values = _line(past_k, k, reach, table), _line(past_v, v, reach, table)
    outputs = []
    for block in reach.blocks():
        parts = q[:, block.rows], keys[:, block.columns], values[:, block.columns], block
        outputs.append(_fused(*parts, scale) if extra.none else _written_out(*parts, reach, extra, scale))
    return silence(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), numbers)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """Block by block, the weights again and from them all gradients, added to what they belong to.

    Ours and not the fused kernel's, which takes (weights * their gradient) from the rounded output: a few times the
    error for no time saved, since that would have to run forward first.
    """
    q, k, v, past_k, past_v, length, positions, numbers, table, slopes, sinks, parents, scale, window, causal, cap = (
        args
    )
    if 0 in q.shape[:3]:
        return [torch.zeros_like(x) for x, need in zip(args, needs, strict=True) if need]
    q, k, v, dy = (silence(x, numbers) for x in (q, k, v, grads[0]))
    extra = Extra(cap, _per_group(slopes, k), _per_group(sinks, k))
    reach = _reach(q, past_k, length, positions, numbers, table, parents, window, causal, GRAD_BLOCK, extra.none)
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (
        _line(p, x, reach, table).to(wide).transpose(1, 2).contiguous() for p, x in ((past_k, k), (past_v, v))
    )
    queries = _backwards(q.to(wide) * scale, keys.shape[1])
    g = _backwards(dy.to(wide), keys.shape[1])
    dq, dkeys, dvalues = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    dslopes, dsinks = (None if x is None else torch.zeros_like(x, dtype=wide) for x in (extra.slopes, extra.sinks))
    tokens = q.shape[1]
    for block in reach.blocks(reverse=True):
        rows = slice(tokens - block.rows.stop, tokens - block.rows.start)
        columns = block.columns
        shape = queries[:, :, rows].shape[:4]  # (B, G, queries, heads of a group)
        qb, gb = queries[:, :, rows].flatten(2, 3), g[:, :, rows].flatten(2, 3)
        kb, vb = keys[:, :, columns], values[:, :, columns]
        logits = (qb @ kb.transpose(-1, -2)).view(*shape, -1)
        near = None if slopes is None else reach.near(block, wide).flip(2)[:, :, :, None]
        logits, bend = extra.logits(logits, near)
        if block.mask is not None:
            logits.masked_fill_(~block.mask.flip(2)[:, :, :, None], -torch.inf)
        weights, missed = extra.weights(logits)
        weights = weights.flatten(2, 3)
        dvalues[:, :, columns] += weights.transpose(-1, -2) @ gb
        found = gb @ vb.transpose(-1, -2)
        total = (weights * found).sum(-1, keepdim=True)
        found.sub_(total).mul_(weights)
        if sinks is not None:
            dsinks -= (missed * total.view_as(missed)).sum((0, 2), keepdim=True)
        if slopes is not None:
            dslopes -= (found.view_as(logits) * near).sum(4, keepdim=True).sum((0, 2), keepdim=True)
        if bend is not None:
            found.mul_(bend.flatten(2, 3))
        dq[:, :, rows] = (found @ kb).view(*shape, -1)
        dkeys[:, :, columns] += found.transpose(-1, -2) @ qb
    dq = (dq * scale).flip(2).transpose(1, 2).flatten(2, 3)
    dkeys, dvalues = dkeys.transpose(1, 2), dvalues.transpose(1, 2)
    made = [
        lambda: dq,
        lambda: dkeys[:, reach.past :],
        lambda: dvalues[:, reach.past :],
        lambda: _past_grad(past_k, dkeys[:, : reach.past], reach, table),
        lambda: _past_grad(past_v, dvalues[:, : reach.past], reach, table),
        *(lambda: None,) * 4,
        lambda: dslopes.flatten(),
        lambda: dsinks.flatten(),
    ]
    return [make().to(x.dtype) for make, x, need in zip(made, args[:11], needs[:11], strict=True) if need]


def _backwards(x: Tensor, groups: int) -> Tensor:
    """(B, T, H, K) as (B, G, T, H / G, K), last query first.

    A key's gradient adds up over queries. The early ones, which share their weight among few keys, count most: added
    last, they cost the sum the least rounding, as in the backward of a loop over time.
    """
    return x.unflatten(2, (groups, -1)).flip(1).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Extra:
    """What changes logits beyond the scale; slopes and sinks (1, G, 1, H / G, 1), or None."""

    softcap: float
    slopes: Tensor | None
    sinks: Tensor | None

    @property
    def none(self) -> bool:
        return not self.softcap and self.slopes is None and self.sinks is None

    def logits(self, products: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of scaled products (B, G, queries, heads of a group, keys); and the slope of the cap, None without one."""
        bend = None
        if self.softcap:
            t = (products / self.softcap).tanh()
            products, bend = self.softcap * t, 1 - t * t
        if self.slopes is not None:
            products = products - self.slopes.to(products.dtype) * near
        return products, bend

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the keys, and of the sink, None without one."""
        if self.sinks is None:
            return logits.softmax(-1), None
        over = self.sinks.to(logits.dtype) - logits.logsumexp(-1, keepdim=True)
        return logits.softmax(-1) * torch.sigmoid(-over), torch.sigmoid(over)


@dataclass(frozen=True)
class Block:
    """Queries `rows` read `columns` of [past | new]; `mask` (B or 1, 1, queries, keys), None: all of them."""

    rows: slice
    columns: slice
    mask: Tensor | None
    causal: bool = False


@dataclass(frozen=True)
class Reach:
    """Who may read what. past: slots read of it. spans: (first query, end, first column, end) of each block."""

    past: int
    spans: list[tuple[int, int, int, int]]
    plain: bool
    causal: bool
    window: int
    index_BS: Tensor | None
    positions: Tensor
    numbers: Tensor | None
    tree: Tensor | None

    def blocks(self, reverse: bool = False) -> Iterator[Block]:
        """One at a time, so that only one mask exists."""
        for start, end, first, last in reversed(self.spans) if reverse else self.spans:
            mask = None if self.plain else self._mask(start, end, first, last)
            yield Block(slice(start, end), slice(first, last), mask, self.plain and self.causal)

    def near(self, block: Block, dtype: torch.dtype) -> Tensor:
        """How far each query is from each key, (B or 1, 1, queries, keys)."""
        at, (first, last) = self.positions, (block.columns.start, block.columns.stop)
        keys = at[:, max(first - self.past, 0) : last - self.past]
        if first < self.past:
            index = self.index_BS[:, first : min(last, self.past)]
            keys = torch.cat([index, keys.expand(len(index), -1)], 1)
        return (at[:, block.rows, None] - keys[:, None]).abs()[:, None].to(dtype)

    def _mask(self, start: int, end: int, first: int, last: int) -> Tensor | None:
        """True where query columns [start, end) may read columns [first, last) of [past | new]."""
        at = self.positions[:, start:end, None]
        here = None if self.numbers is None else self.numbers[:, start:end, None]
        sides = []
        if first < self.past:
            index = self.index_BS[:, None, first : min(last, self.past)]
            sees = index >= 0
            if self.window:
                sees = sees & (index > at - self.window)
            sides.append(sees if here is None else sees & (here == 0))
        begin, stop = max(first - self.past, 0), last - self.past
        columns = torch.arange(begin, stop, device=at.device)
        queries = torch.arange(start, end, device=at.device)[:, None]
        sees = columns <= queries if self.causal else torch.ones_like(columns <= queries)
        sees = sees[None]
        if self.window:
            sees = sees & (self.positions[:, None, begin:stop] > at - self.window)
        if self.tree is not None:
            sees = sees & self.tree[:, start:end, begin:stop]
        if here is not None:
            sees = sees & (self.numbers[:, None, begin:stop] == here) & (here >= 0)
            sees = sees | ((columns == queries) & (here < 0))  # padding reads itself, so that no softmax is empty
        sides.append(sees)
        if len(sides) == 2:
            rows = max(side.shape[0] for side in sides)
            sides = [side.expand(rows, end - start, -1) for side in sides]
            sees = torch.cat(sides, 2)
        if end - start == 1 and bool(sees.all()):
            return None
        return sees[:, None]


def _reach(q, past, length, positions, numbers, table, parents, window, causal, size, bare) -> Reach:
    tokens, device = q.shape[1], q.device
    columns = torch.arange(tokens, device=device)
    simple = past is None and numbers is None and parents is None and not window and bare
    if simple and (size == BLOCK or not causal):
        spans = [(start, min(start + size, tokens), 0, tokens) for start in range(0, tokens, size)]
        return Reach(
            0, [(0, tokens, 0, tokens)] if size == BLOCK else spans, True, causal, 0, None, columns, None, None
        )
    offset = columns.new_zeros(1, 1) if past is None else length[:, None]
    regular = positions is None and numbers is None and parents is None
    if positions is None:
        positions = offset + columns
    index, slots = None, 0
    if past is not None:
        capacity = past.shape[1] * (1 if table is None else table.shape[1])
        slots = min(capacity, int(length.max())) if len(length) else 0
        index = slot_index(length, capacity)[:, :slots]
    starts = list(range(0, tokens, size))
    ends = [min(start + size, tokens) for start in starts]
    if regular:
        first = [max(start - window + 1, 0) if window else 0 for start in starts]
        last = ends if causal else [tokens] * len(starts)
        back = [bool(slots) and (not window or start - window + 1 < 0) for start in starts]
    elif parents is not None:  # positions do not grow along the columns of a tree, and there are few
        first, last, back = [0] * len(starts), ends, [bool(slots)] * len(starts)
    else:
        first, last, back = _ranges(positions, numbers, length if slots else None, window, causal, starts, ends)
    spans = [
        (start, end, 0 if reads else slots + low, slots + high)
        for start, end, low, high, reads in zip(starts, ends, first, last, back, strict=True)
    ]
    tree = None if parents is None else ancestors(parents)
    return Reach(slots, spans, False, causal, window, index, positions, numbers, tree)


def _ranges(positions, numbers, length, window, causal, starts, ends) -> tuple[list[int], list[int], list[bool]]:
    """For each block of queries: the first new column any of them reads, the end, and whether any reads the past.

    Columns are sorted by (document, position), so each query's range is two binary searches.
    """
    if numbers is None:
        numbers = torch.zeros_like(positions)
    positions, numbers = torch.broadcast_tensors(positions, numbers)
    real = numbers >= 0
    place = segments.filled(numbers)
    big = positions.max() + 1
    key = torch.where(real, place * big + positions, 0).cummax(1).values
    low = place * big + ((positions - window + 1).clamp(min=0) if window else 0)
    low = torch.searchsorted(key, torch.where(real, low, key))
    high = None if causal else torch.searchsorted(key, torch.where(real, place * big + big - 1, key), right=True)
    back = torch.zeros_like(real)
    if length is not None:
        back = (numbers == 0) & (length[:, None] > 0)
        if window:
            back = back & (positions - window + 1 < length[:, None])
    spans = list(zip(starts, ends, strict=True))
    first = torch.stack([low[:, a:b].min() for a, b in spans]).tolist()
    last = ends if causal else torch.stack([high[:, a:b].max() for a, b in spans]).tolist()
    return first, last, torch.stack([back[:, a:b].any() for a, b in spans]).tolist()


def _line(past: Tensor | None, new: Tensor, reach: Reach, table: Tensor | None) -> Tensor:
    """[past | new] columns; what an empty slot holds is never read, so that not even a NaN there matters."""
    if not reach.past:
        return new
    if table is None:
        past = past[:, : reach.past]
    else:
        past = past[table[:, : -(-reach.past // past.shape[1])]].flatten(1, 2)[:, : reach.past]
    empty = reach.index_BS < 0
    if bool(empty.any()):
        past = past.masked_fill(empty[..., None, None], 0)
    return torch.cat([past.to(new.dtype), new], 1)


def _past_grad(past: Tensor, found: Tensor, reach: Reach, table: Tensor | None) -> Tensor:
    """The gradient of all slots (or the pool) from that of the slots read."""
    whole = torch.zeros_like(past, memory_format=torch.contiguous_format)
    if not reach.past:
        return whole
    found = found.masked_fill((reach.index_BS < 0)[..., None, None], 0).to(past.dtype)
    if table is None:
        whole[:, : reach.past] = found
        return whole
    slots = torch.arange(reach.past, device=past.device)
    pages = table[:, slots // past.shape[1]]
    return whole.index_put_((pages, (slots % past.shape[1]).expand_as(pages)), found, accumulate=True)


def silence(x: Tensor, numbers: Tensor | None) -> Tensor:
    """Zero at padding, whatever is there: a weight of 0 would keep its NaN."""
    return x if numbers is None else x.masked_fill((numbers < 0)[..., None, None], 0)


def _per_group(x: Tensor | None, k: Tensor) -> Tensor | None:
    return None if x is None else x.view(1, k.shape[2], 1, -1, 1)


def _written_out(q: Tensor, k: Tensor, v: Tensor, block: Block, reach: Reach, extra: Extra, scale: float) -> Tensor:
    """As `_fused`, with what it cannot do."""
    wide = torch.promote_types(q.dtype, torch.float32)
    qb = (q.to(wide) * scale).unflatten(2, (k.shape[2], -1)).transpose(1, 2)
    products = qb.flatten(2, 3) @ k.to(wide).permute(0, 2, 3, 1)
    near = None if extra.slopes is None else reach.near(block, wide)[:, :, :, None]
    logits, _ = extra.logits(products.view(*qb.shape[:4], -1), near)
    if block.mask is not None:
        logits = logits.masked_fill(~block.mask[:, :, :, None], -torch.inf)
    weights, _ = extra.weights(logits)
    y = (weights.flatten(2, 3) @ v.to(wide).transpose(1, 2)).view(*qb.shape[:4], -1)
    return y.transpose(1, 2).flatten(2, 3).to(q.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> Tensor:
    """torch's attention on (B, T, H, K); keys and values of unequal size are filled up, which its fast form needs."""
    size = v.shape[3]
    if size < k.shape[3]:
        v = pad(v, (0, k.shape[3] - size))
    elif size > k.shape[3]:
        q, k = pad(q, (0, size - q.shape[3])), pad(k, (0, size - k.shape[3]))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=block.mask,
        is_causal=block.causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.transpose(1, 2)[..., :size]
