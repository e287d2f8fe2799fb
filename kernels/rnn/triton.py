"""Recurrent networks on a GPU: the whole sequence in one launch, the recurrent weights on chip where they fit.

A program owns a block of rows and a slice of the hidden units of one head. Before the loop it loads the rows of the
weight that make its slice's gates; after every token the programs of a head hand each other their hidden units through
memory and meet at a barrier (an atomic counter, in a cooperative launch). Backward is the same with the transposed
weight: what the programs hand each other are the gradients of the gates. A weight too large to keep is read again, in
blocks, from the cache. Units that read themselves alone (IndRNN) need no barrier.

Triton's interpreter runs one program to its end before the next: there the host walks the sequence, a launch a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import segments
from kernels.launch import INTERPRETED, launch, precision
from kernels.rnn.cells import CELLS

SAVED = 1
ON_CHIP = 160 * 1024  # bytes of weight that a program may keep, of the 227 KB of shared memory
KINDS = {"tanh": 0, "relu": 1, "gru": 2, "lstm": 3, "slstm": 4, "min_gru": 5, "min_lstm": 6}


def forward(
    x_BTGU: Tensor,
    weight: Tensor | None,
    bias_GU: Tensor | None,
    state_BSU: Tensor | None,
    segments_BT: Tensor | None,
    cell: str,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`; then, for `grad`, the states around every token (T+1, S, B, U) fp32."""
    x_BTGU, weight = x_BTGU.contiguous(), _cast(weight, x_BTGU)
    rows, tokens, gates, units = x_BTGU.shape
    fresh = CELLS[cell].state
    states = torch.empty(tokens + 1, len(fresh), rows, units, dtype=torch.float32, device=x_BTGU.device)
    for s, value in enumerate(fresh):
        states[0, s] = value if state_BSU is None else state_BSU[:, s]
    y_BTU = x_BTGU.new_empty(rows, tokens, units)
    marks = _marks(segments_BT)
    bias = None if bias_GU is None else bias_GU.contiguous()
    _walk(_forward, range(tokens), weight, x_BTGU, cell, x_BTGU, weight, bias, states, y_BTU, *marks)
    after = (states[tokens - keep :].permute(2, 0, 1, 3) if keep else states[tokens].transpose(0, 1)).clone()
    return y_BTU, after, states


def fake(x_BTGU, weight, bias_GU, state_BSU, segments_BT, cell, keep):
    rows, tokens, _, units = x_BTGU.shape
    moments, count = ((keep + 1,) if keep else ()), len(CELLS[cell].state)
    state = x_BTGU.new_empty(rows, *moments, count, units, dtype=torch.float32)
    states = x_BTGU.new_empty(tokens + 1, count, rows, units, dtype=torch.float32)
    return x_BTGU.new_empty(rows, tokens, units), state, states


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """Recurrent products for all tokens in one matrix product, then one launch back through time."""
    x_BTGU, weight, bias_GU, state_BSU, segments_BT, cell, keep = args
    x_BTGU, cast, states = x_BTGU.contiguous(), _cast(weight, x_BTGU), outputs[0]
    dense = cast is not None and cast.dim() == 4
    rows, tokens, gates, units = x_BTGU.shape
    real, begins = _marks(segments_BT)
    before_TBU = states[:-1, 0]
    if begins is not None:
        before_TBU = before_TBU.masked_fill(begins.T[..., None].bool(), 0)
    recurrent_TBGU = _products(before_TBU, cast, bias_GU) if dense else None
    dy_BTU = grads[0].contiguous()
    dmoments = grads[1].float().permute(1, 2, 0, 3) if keep else grads[1].float().transpose(0, 1)[None]
    dmoments = dmoments.contiguous()
    carried_SBU = dmoments[keep].clone()
    dr_TBGU = x_BTGU.new_empty(tokens, rows, gates, units)
    # Only in a GRU does a gate's x enter otherwise than its r.
    dx_BTGU = torch.empty_like(x_BTGU) if cell == "gru" else None
    _walk(
        _backward, range(tokens - 1, -1, -1), cast, x_BTGU, cell,
        x_BTGU, cast, recurrent_TBGU, states, dy_BTU, dmoments, carried_SBU, dr_TBGU, dx_BTGU, real, begins, keep,
    )  # fmt: skip
    if tokens and dense:  # what the first token's gates owe to the state that was carried in
        first = _adjoint(dr_TBGU[0], cast)
        carried_SBU[0] += first if begins is None else first.masked_fill(begins[:, :1].bool(), 0)
    if keep == tokens and keep:
        carried_SBU = carried_SBU + dmoments[0]
    found = []
    if needs[0]:
        found.append(dr_TBGU.transpose(0, 1) if dx_BTGU is None else dx_BTGU)
    if needs[1]:
        found.append(_weight_grad(weight, dr_TBGU, before_TBU))
    if needs[2]:
        found.append(dr_TBGU.sum((0, 1), dtype=torch.float32).to(bias_GU.dtype))
    if needs[3]:
        found.append(carried_SBU.transpose(0, 1).to(state_BSU.dtype))
    return found


def _cast(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype).contiguous()


def _walk(kernel, times: range, weight: Tensor | None, x: Tensor, cell: str, *args) -> None:
    """Launch `kernel` over all tokens: for as many blocks of rows at once as the card holds programs of."""
    dense = weight is not None and weight.dim() == 4
    rows, tokens, _, units = x.shape
    heads, size = (len(weight), weight.shape[-1]) if dense else (1, units)
    gates, block = CELLS[cell].gates, max(16, triton.next_power_of_2(size))
    lines, inner, slice_, kept = 1, block, min(128, block), True
    if dense:
        lines = min(32, max(16, triton.next_power_of_2(rows)))  # 64 rows would not leave room in the registers
        each = gates * block * x.element_size()  # bytes of weight that a hidden unit brings
        slice_ = min(block, max(16, 1 << max(0, (ON_CHIP // each).bit_length() - 1)))
        kept = each * slice_ <= ON_CHIP
        inner = max(16, min(block, 4096 // lines))  # hidden units of a tile of rows: 8 KB in bf16
    slices, bands = triton.cdiv(size, slice_), triton.cdiv(rows, lines)
    waits = dense and slices > 1
    device = x.device
    room = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1 << 30
    together = max(1, room // slices if waits else heads * bands)  # (head, band) pairs of one launch
    warps = 1 if not dense else 8 if gates * block * slice_ >= 2**15 else 4
    meta = dict(
        KIND=KINDS[cell], G=gates, S=len(CELLS[cell].state), H=size, INNER=inner, BLOCKS=block // inner, SLICE=slice_,
        LINES=lines, DENSE=dense, KEPT=kept, num_warps=warps, num_stages=1,
    )  # fmt: skip
    alone = waits and INTERPRETED
    for first in range(0, heads * bands, together):
        pairs = min(together, heads * bands - first)
        counters = torch.zeros(pairs, dtype=torch.int32, device=device) if waits else None
        for part in [range(t, t + times.step, times.step) for t in times] if alone else [times]:
            if not len(part):
                continue
            if waits and not alone:
                meta["launch_cooperative_grid"] = True
            launch(
                kernel, (pairs * slices,), *args, counters, first, part[0], len(part), rows, tokens, heads, slices,
                WAITS=waits and not alone, PRECISION=precision(x.dtype), **meta,
            )  # fmt: skip


def _products(before_TBU: Tensor, weight: Tensor, bias_GU: Tensor | None) -> Tensor:
    """What hidden units give to the gates, for all tokens: (T, B, G, U) in weight's dtype."""
    heads, gates, size, _ = weight.shape
    h = before_TBU.to(weight.dtype).unflatten(-1, (heads, size)).flatten(0, 1).transpose(0, 1)  # (N, T B, H)
    r = h @ weight.flatten(1, 2).transpose(1, 2)  # (N, T B, G H)
    r = r.unflatten(-1, (gates, size)).permute(1, 2, 0, 3).flatten(2).unflatten(0, before_TBU.shape[:2])
    return (r if bias_GU is None else r + bias_GU.to(r.dtype)).contiguous()


def _adjoint(dr_BGU: Tensor, weight: Tensor) -> Tensor:
    """Gradients of hidden units (B, U) from those of the gates they give to, fp32."""
    dr = dr_BGU.float().unflatten(-1, (len(weight), -1))
    return torch.einsum("ngij,bgni->bnj", weight.float(), dr).flatten(1)


def _weight_grad(weight: Tensor, dr_TBGU: Tensor, before_TBU: Tensor) -> Tensor:
    """The gradient of the weight, one product over all tokens."""
    if weight.dim() == 2:
        return (dr_TBGU.float() * before_TBU[:, :, None]).sum((0, 1)).to(weight.dtype)
    h = before_TBU.to(dr_TBGU.dtype)
    heads, gates, size, _ = weight.shape
    dr = dr_TBGU.unflatten(-1, (heads, size)).permute(3, 0, 1, 2, 4).reshape(heads, -1, gates * size)
    h = h.unflatten(-1, (heads, size)).permute(2, 0, 1, 3).reshape(heads, -1, size)
    return (dr.transpose(1, 2) @ h).view(weight.shape).to(weight.dtype)


def _marks(segments_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where tokens are real and where documents begin, (B, T) int8."""
    if segments_BT is None:
        return None, None
    begins_BT = segments.begins(segments.filled(segments_BT))
    return (segments_BT >= 0).to(torch.int8), begins_BT.to(torch.int8)


@triton.jit
def _meet(counter, target):
    """Wait until `target` arrivals: what each program wrote before is then seen by all."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    small = tl.abs(x) < 0.02  # where 1 - e cancels
    exact = x * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0)))
    return tl.where(small, exact, tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e))


@triton.jit
def _log_sigmoid(x):
    e = tl.exp(-tl.abs(x))
    log = tl.where(e < 0.001, e * (1.0 - e * (0.5 - e * (1.0 / 3.0))), tl.log(1.0 + e))
    return tl.minimum(x, 0.0) - log


@triton.jit
def _positive(x):
    return tl.where(x >= 0, x + 0.5, _sigmoid(x))


@triton.jit
def _step(x, r, s, KIND: tl.constexpr):
    """The state after one token."""
    if KIND == 0:
        return (_tanh(x[0] + r[0]),)
    elif KIND == 1:
        return (tl.maximum(x[0] + r[0], 0.0),)
    elif KIND == 2:
        new = _tanh(x[2] + _sigmoid(x[0] + r[0]) * r[2])
        return (new + _sigmoid(x[1] + r[1]) * (s[0] - new),)
    elif KIND == 3:
        c = _sigmoid(x[1] + r[1]) * s[1] + _sigmoid(x[0] + r[0]) * _tanh(x[2] + r[2])
        return _sigmoid(x[3] + r[3]) * _tanh(c), c
    elif KIND == 4:
        forget, write = _log_sigmoid(x[1] + r[1]) + s[3], x[0] + r[0]
        most = tl.maximum(forget, write)
        f, i = tl.exp(forget - most), tl.exp(write - most)
        c = f * s[1] + i * _tanh(x[2] + r[2])
        n = f * s[2] + i
        return _sigmoid(x[3] + r[3]) * c / n, c, n, most
    elif KIND == 5:
        return (s[0] + _sigmoid(x[0]) * (_positive(x[1]) - s[0]),)
    else:
        new = _positive(x[2])
        return (new + _sigmoid(_log_sigmoid(x[0]) - _log_sigmoid(x[1])) * (s[0] - new),)


@triton.jit
def _back(x, r, s, out, d, KIND: tl.constexpr):
    """From gradients d of the state after: of the gates' r, of the last gate's x, of the state before but through r."""
    none = tl.zeros_like(d[0])
    if KIND == 0:
        h = _tanh(x[0] + r[0])
        e = d[0] * (1.0 - h * h)
        return (e,), e, (none,)
    elif KIND == 1:  # the side of the kink that forward took, which rounding of r must not change
        e = tl.where(out > 0, d[0], 0.0)
        return (e,), e, (none,)
    elif KIND == 2:
        reset, update = _sigmoid(x[0] + r[0]), _sigmoid(x[1] + r[1])
        new = _tanh(x[2] + reset * r[2])
        dnew = d[0] * (1.0 - update) * (1.0 - new * new)
        of_reset = dnew * r[2] * reset * (1.0 - reset)
        of_update = d[0] * (s[0] - new) * update * (1.0 - update)
        return (of_reset, of_update, dnew * reset), dnew, (d[0] * update,)
    elif KIND == 3:
        i, f, g, o = _sigmoid(x[0] + r[0]), _sigmoid(x[1] + r[1]), _tanh(x[2] + r[2]), _sigmoid(x[3] + r[3])
        c = _tanh(f * s[1] + i * g)
        dc = d[1] + d[0] * o * (1.0 - c * c)
        e = (dc * g * i * (1.0 - i), dc * s[1] * f * (1.0 - f), dc * i * (1.0 - g * g), d[0] * c * o * (1.0 - o))
        return e, e[3], (none, dc * f)
    elif KIND == 4:
        z, o = _tanh(x[2] + r[2]), _sigmoid(x[3] + r[3])
        forget, write = _log_sigmoid(x[1] + r[1]) + s[3], x[0] + r[0]
        most = tl.maximum(forget, write)
        f, i = tl.exp(forget - most), tl.exp(write - most)
        c, n = f * s[1] + i * z, f * s[2] + i
        dc = d[1] + d[0] * o / n
        dn = d[2] - d[0] * o * c / (n * n)
        df, di = (dc * s[1] + dn * s[2]) * f, (dc * z + dn) * i
        dmost = d[3] - df - di
        share = tl.where(forget > write, 1.0, tl.where(forget < write, 0.0, 0.5))  # as torch.maximum divides it
        df += dmost * share
        of_i, of_f = di + dmost * (1.0 - share), df * _sigmoid(-(x[1] + r[1]))
        e = (of_i, of_f, dc * i * (1.0 - z * z), d[0] * c / n * o * (1.0 - o))
        return e, e[3], (none, dc * f, dn * f, df)
    elif KIND == 5:
        update = _sigmoid(x[0])
        e = d[0] * update * tl.where(x[1] >= 0, 1.0, _sigmoid(x[1]) * _sigmoid(-x[1]))
        return (d[0] * (_positive(x[1]) - s[0]) * update * (1.0 - update), e), e, (d[0] * (1.0 - update),)
    else:
        forget = _sigmoid(_log_sigmoid(x[0]) - _log_sigmoid(x[1]))
        slope = d[0] * (s[0] - _positive(x[2])) * forget * (1.0 - forget)
        e = d[0] * (1.0 - forget) * tl.where(x[2] >= 0, 1.0, _sigmoid(x[2]) * _sigmoid(-x[2]))
        return (slope * _sigmoid(-x[0]), -slope * _sigmoid(-x[1]), e), e, (d[0] * forget,)


@triton.jit
def _tile(weight, gate, k, i, H, TRANSPOSED: tl.constexpr):
    """Of a head's weight (G, H, H): from units k to a gate of units i, (K, I); transposed, from a gate of k to i."""
    inside = (k < H)[:, None] & (i < H)[None, :]
    if TRANSPOSED:
        at = (gate * H + k[:, None]) * H + i[None, :]
    else:
        at = (gate * H + i[None, :]) * H + k[:, None]
    return tl.load(weight + at, mask=inside, other=0.0)


@triton.jit
def _tiles(
    weight, i, H,
    G: tl.constexpr, BLOCKS: tl.constexpr, INNER: tl.constexpr, KEPT: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The slice of the weight that a program keeps, gate by gate in blocks of units; nothing if it is too large."""
    tiles = ()
    if KEPT:
        for gate in tl.static_range(G):
            for j in tl.static_range(BLOCKS):
                tiles = tiles + (_tile(weight, gate, j * INNER + tl.arange(0, INNER), i, H, TRANSPOSED),)
    return tiles


@triton.jit
def _load(base, stride, inside, COUNT: tl.constexpr):
    """COUNT tiles, `stride` apart, in fp32."""
    tiles = ()
    for n in tl.static_range(COUNT):
        tiles = tiles + (tl.load(base + n * stride, mask=inside, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _store(base, stride, inside, tiles, COUNT: tl.constexpr):
    for n in tl.static_range(COUNT):
        tl.store(base + n * stride, tiles[n].to(base.dtype.element_ty), mask=inside)


@triton.jit
def _either(here, tiles, others, COUNT: tl.constexpr):
    """tiles where `here`, else the others."""
    chosen = ()
    for n in tl.static_range(COUNT):
        chosen = chosen + (tl.where(here, tiles[n], others[n]),)
    return chosen


@triton.jit
def _fresh(state, COUNT: tl.constexpr):
    """The state of no token: 0, but for the largest exponent of an sLSTM."""
    tiles = ()
    for n in tl.static_range(COUNT):
        tiles = tiles + (tl.full(state[n].shape, float("-inf") if n == 3 else 0.0, tl.float32),)
    return tiles


@triton.jit
def _forward(
    x, weight, bias, states, y, real, begins, counters, first, start, steps, B, T, heads, slices,
    KIND: tl.constexpr, G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, BLOCKS: tl.constexpr,
    SLICE: tl.constexpr, LINES: tl.constexpr, DENSE: tl.constexpr, KEPT: tl.constexpr, WAITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = first + tl.program_id(0) // slices
    head, band = pair % heads, pair // heads
    b = band * LINES + tl.arange(0, LINES)
    i = (tl.program_id(0) % slices) * SLICE + tl.arange(0, SLICE)
    U = heads * H
    inside = (b < B)[:, None] & (i < H)[None, :]
    own = b[:, None] * U + head * H + i[None, :]
    tiles = ()
    if DENSE:
        weight += head * G * H * H
        tiles = _tiles(weight, i, H, G, BLOCKS, INNER, KEPT, False)
    elif weight is not None:
        tiles = _load(weight + i, H, i < H, G)
    given = ()
    if bias is not None:
        given = _load(bias + head * H + i, U, i < H, G)
    for step in range(0, steps):
        t = start + step
        here = states + t.to(tl.int64) * S * B * U
        now = _load(here + own, B * U, inside, S)
        before = now
        if begins is not None:
            fresh = tl.load(begins + b.to(tl.int64) * T + t, mask=b < B, other=0)[:, None] != 0
            before = _either(fresh, _fresh(now, S), now, S)
        r = ()
        for gate in tl.static_range(G):
            if bias is not None:
                r = r + (tl.zeros((LINES, SLICE), tl.float32) + given[gate][None, :],)
            else:
                r = r + (tl.zeros((LINES, SLICE), tl.float32),)
        if DENSE:
            for j in tl.static_range(BLOCKS):
                k = j * INNER + tl.arange(0, INNER)
                at = b[:, None] * U + head * H + k[None, :]
                h = tl.load(here + at, mask=(b < B)[:, None] & (k < H)[None, :], other=0.0, cache_modifier=".cg")
                if begins is not None:
                    h = tl.where(fresh, 0.0, h)
                h = h.to(weight.dtype.element_ty)
                added = ()
                for gate in tl.static_range(G):
                    w = tiles[gate * BLOCKS + j] if KEPT else _tile(weight, gate, k, i, H, False)
                    added = added + (tl.dot(h, w, r[gate], input_precision=PRECISION),)
                r = added
        elif weight is not None:
            r = (r[0] + tiles[0][None, :] * before[0],)
        token = b.to(tl.int64)[:, None] * T + t
        given_x = _load(x + token * (G * U) + head * H + i[None, :], U, inside, G)
        after = _step(given_x, r, before, KIND)
        out = after[0]
        if real is not None:
            there = tl.load(real + b.to(tl.int64) * T + t, mask=b < B, other=0)[:, None] != 0
            after = _either(there, after, now, S)
            out = tl.where(there, out, 0.0)
        tl.store(y + token * U + head * H + i[None, :], out.to(y.dtype.element_ty), mask=inside)
        _store(here + S * B * U + own, B * U, inside, after, S)
        if WAITS:
            _meet(counters + tl.program_id(0) // slices, (step + 1) * slices)
        else:
            tl.debug_barrier()


@triton.jit
def _backward(
    x, weight, recurrent, states, dy, dmoments, carried, dr, dx, real, begins, keep,
    counters, first, start, steps, B, T, heads, slices,
    KIND: tl.constexpr, G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, BLOCKS: tl.constexpr,
    SLICE: tl.constexpr, LINES: tl.constexpr, DENSE: tl.constexpr, KEPT: tl.constexpr, WAITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = first + tl.program_id(0) // slices
    head, band = pair % heads, pair // heads
    b = band * LINES + tl.arange(0, LINES)
    i = (tl.program_id(0) % slices) * SLICE + tl.arange(0, SLICE)
    U = heads * H
    inside = (b < B)[:, None] & (i < H)[None, :]
    own = b[:, None] * U + head * H + i[None, :]
    tiles = ()
    if DENSE:
        weight += head * G * H * H
        tiles = _tiles(weight, i, H, G, BLOCKS, INNER, KEPT, True)
    elif weight is not None:
        tiles = _load(weight + i, H, i < H, G)
    d = _load(carried + own, B * U, inside, S)
    for step in range(0, steps):
        t = start - step
        here = states + t.to(tl.int64) * S * B * U
        through = tl.zeros((LINES, SLICE), tl.float32)  # the recurrent weight, from the gates of the token after
        if DENSE:
            known = b < B * (t + 1 < T).to(tl.int32)
            if begins is not None:
                known = known & (tl.load(begins + b.to(tl.int64) * T + t + 1, mask=known, other=1) == 0)
            for j in tl.static_range(BLOCKS):
                k = j * INNER + tl.arange(0, INNER)
                at = dr + ((t + 1).to(tl.int64) * B + b[:, None]) * (G * U) + head * H + k[None, :]
                mask = known[:, None] & (k < H)[None, :]
                for gate in tl.static_range(G):
                    w = tiles[gate * BLOCKS + j] if KEPT else _tile(weight, gate, k, i, H, True)
                    made = tl.load(at + gate * U, mask=mask, other=0.0, cache_modifier=".cg")
                    through = tl.dot(made, w, through, input_precision=PRECISION)
        added = (d[0] + through,)
        for n in tl.static_range(1, S):
            added = added + (d[n],)
        d = added
        before = _load(here + own, B * U, inside, S)
        out = before[0]
        if KIND == 1:
            out = tl.load(here + S * B * U + own, mask=inside, other=0.0)
        if begins is not None:
            fresh = tl.load(begins + b.to(tl.int64) * T + t, mask=b < B, other=0)[:, None] != 0
            before = _either(fresh, _fresh(before, S), before, S)
        token = b.to(tl.int64)[:, None] * T + t
        place = token * (G * U) + head * H + i[None, :]
        product = (t.to(tl.int64) * B + b[:, None]) * (G * U) + head * H + i[None, :]
        given_x = _load(x + place, U, inside, G)
        r = given_x
        if DENSE:
            r = _load(recurrent + product, U, inside, G)
        elif weight is not None:
            r = (tiles[0][None, :] * before[0],)
        got = tl.load(dy + token * U + head * H + i[None, :], mask=inside, other=0.0).to(tl.float32)
        asked = (d[0] + got,)
        for n in tl.static_range(1, S):
            asked = asked + (d[n],)
        e, last, passed = _back(given_x, r, before, out, asked, KIND)
        if real is not None:
            there = tl.load(real + b.to(tl.int64) * T + t, mask=b < B, other=0)[:, None] != 0
            masked = ()
            for gate in tl.static_range(G):
                masked = masked + (tl.where(there, e[gate], 0.0),)
            e = masked
            last = tl.where(there, last, 0.0)
        _store(dr + product, U, inside, e, G)
        if dx is not None:
            _store(dx + place, U, inside, e, G - 1)
            tl.store(dx + place + (G - 1) * U, last.to(dx.dtype.element_ty), mask=inside)
        if not DENSE and weight is not None:
            passed = (passed[0] + tiles[0][None, :] * e[0],)
        if real is not None:
            stopped = ()
            for n in tl.static_range(S):
                stopped = stopped + (tl.where(there, tl.where(fresh, 0.0, passed[n]), d[n]),)
            passed = stopped
        # The host adds the gradient of the state before the first token.
        moment = t - T + keep
        wanted = (b < B * ((moment >= 0) & (t > 0)).to(tl.int32))[:, None] & (i < H)[None, :]
        more = _load(dmoments + moment.to(tl.int64) * S * B * U + own, B * U, wanted, S)
        d = ()
        for n in tl.static_range(S):
            d = d + (passed[n] + more[n],)
        if WAITS:
            _meet(counters + tl.program_id(0) // slices, (step + 1) * slices)
        else:
            tl.debug_barrier()
    _store(carried + own, B * U, inside, d, S)
