"""Attention to selected blocks for CPUs: the keys of a few queries at a time are gathered and multiplied at once."""

import torch
from torch import Tensor

from kernels import op
from kernels.attention.chunked import silence
from kernels.block_sparse_attention.places import once, places

GATHERED = 2**22  # channels of keys and values that exist at one time


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
    blocks_BTGN: Tensor,
    scale: float,
    block: int,
    linear: bool,
) -> Tensor:
    """y (B, T, H, V); as `reference`."""
    q_BTHK = silence(q_BTHK, segments_BT)
    args = (q_BTHK, k_BTGK, v_BTGV, past_k, past_v, length_B, positions_BT, segments_BT, table_BN, blocks_BTGN)
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    groups = k_BTGK.shape[2]
    keys, values = _line(past_k, k_BTGK, table_BN, wide), _line(past_v, v_BTGV, table_BN, wide)
    outputs = [q_BTHK.new_zeros(q_BTHK.shape[0], 0, q_BTHK.shape[2], v_BTGV.shape[3])]
    for part, column, sees in _parts(*args, block):
        q = q_BTHK[:, part].to(wide).unflatten(2, (groups, -1)).transpose(1, 2)
        weights = _weights(q, _gather(keys, column, sees), sees, scale, linear)
        y = weights @ _gather(values, column, sees)
        outputs.append(y.transpose(1, 2).flatten(2, 3).to(q_BTHK.dtype))
    return torch.cat(outputs, 1)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """A part at a time as forward, what its keys get being added where they came from; a past leaves it to autograd."""
    q_BTHK, k_BTGK, v_BTGV, past_k, _, _, _, segments_BT, table, _, scale, block, linear = args
    if past_k is not None:
        return op.recompute(chunked, args, grads, needs, again=False)
    q_BTHK, dy = silence(q_BTHK, segments_BT), silence(grads[0], segments_BT)
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    groups = k_BTGK.shape[2]
    keys, values = (_line(None, x, table, wide) for x in (k_BTGK, v_BTGV))
    dq, dkeys, dvalues = torch.zeros_like(q_BTHK, dtype=wide), torch.zeros_like(keys), torch.zeros_like(values)
    for part, column, sees in _parts(*args[:-3], block):
        q, g = (x[:, part].to(wide).unflatten(2, (groups, -1)).transpose(1, 2) for x in (q_BTHK, dy))
        k = _gather(keys, column, sees)
        weights = _weights(q, k, sees, scale, linear)
        found = g @ _gather(values, column, sees).transpose(-1, -2)
        if not linear:
            found = weights * (found - (weights * found).sum(-1, keepdim=True))
        found = found * scale
        dq[:, part] = (found @ k).transpose(1, 2).flatten(2, 3)
        _scatter(dkeys, column, found.transpose(-1, -2) @ q)
        _scatter(dvalues, column, weights.transpose(-1, -2) @ g)
    made = (dq, dkeys.transpose(1, 2), dvalues.transpose(1, 2))
    return [x.to(q_BTHK.dtype) for x, need in zip(made, needs, strict=False) if need]


def _parts(q, k, v, past_k, past_v, length, positions, segments, table, blocks, block):
    """(queries, column of [past | new] of each of their keys (B, G, queries, keys), whether it is one)."""
    rows, tokens, groups, count = blocks.shape
    blocks = once(blocks)
    new = torch.arange(tokens, device=q.device).expand(rows, -1)
    slots = 0
    known = new.new_zeros(rows, 1)
    if past_k is not None:
        slots = past_k.shape[1] * (1 if table is None else table.shape[1])
        known = length[:, None]
    at = new + known if segments is None else positions
    where = places(at, segments)
    base = -known.expand(-1, tokens) if where.base_BT is None else where.base_BT
    many = max(1, GATHERED // max(1, rows * groups * count * block * (k.shape[3] + v.shape[3])))
    for start in range(0, tokens, many):
        part = slice(start, start + many)
        chosen = blocks[:, part].transpose(1, 2)[..., None]
        key_at = (chosen * block + torch.arange(block, device=q.device)).flatten(3)
        sees = (chosen >= 0).expand(*chosen.shape[:-1], block).flatten(3) & (key_at <= at[:, None, part, None])
        inside = None if segments is None else segments[:, None, part, None]
        sees = sees if inside is None else sees & (inside >= 0)
        place = key_at + base[:, None, part, None]
        if past_k is None:
            sees = sees & (place >= 0)
        else:
            first = known[:, None, None] if inside is None else torch.where(inside == 0, known[:, None, None], 0)
            sees = sees & (key_at >= first - slots)
        column = place.clamp(0, tokens - 1)
        if where.column_BT is not None:
            column = where.column_BT[:, None, None].expand(*column.shape[:3], -1).gather(3, column)
        if past_k is not None:
            column = torch.where(key_at < first, key_at % slots, column + slots)
        yield part, column, sees


def _line(past: Tensor | None, new: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[past | new] as (B, G, S + T, K)."""
    if past is not None:
        past = past if table is None else past[table].flatten(1, 2)
        new = torch.cat([past.to(new.dtype), new], 1)
    return new.to(dtype).transpose(1, 2).contiguous()


def _gather(line: Tensor, column: Tensor, sees: Tensor) -> Tensor:
    """(B, G, queries, keys, K); zero, whatever is there, where nothing is seen."""
    size = line.shape[3]
    found = line.gather(2, column.flatten(2)[..., None].expand(-1, -1, -1, size)).view(*column.shape, size)
    return found.masked_fill(~sees[..., None], 0)


def _scatter(line: Tensor, column: Tensor, found: Tensor) -> None:
    """`_gather` the other way: adds to `line`; what was not seen has weights of 0 and adds nothing."""
    line.scatter_add_(2, column.flatten(2)[..., None].expand(-1, -1, -1, line.shape[3]), found.flatten(2, 3))


def _weights(q: Tensor, k: Tensor, sees: Tensor, scale: float, linear: bool) -> Tensor:
    """(B, G, queries, heads of a group, keys); all 0 for a query that sees nothing."""
    if linear:
        return q @ k.transpose(-1, -2) * scale  # keys that are not seen have been gathered as zeros
    sees = sees[:, :, :, None]
    some = sees.any(-1, keepdim=True)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~sees & some, -torch.inf)
    return logits.softmax(-1).masked_fill(~some, 0)
