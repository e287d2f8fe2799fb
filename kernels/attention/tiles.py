"""Which tiles of queries meet which tiles of keys, and how a kernel reads them.

A kernel walks a range of tiles `first <= whole <= cut <= last` of the other side: all of it is read, [whole, cut)
without a mask. The range follows from the tile's columns, or from `schedule` where tokens have positions and documents
of their own.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CACHE = 24 * 2**20  # bytes of keys and values that programs running at the same time should share


@dataclass(frozen=True)
class Places:
    """Where tokens stand, int64; None: positions are columns, and all is one document.

    Positions of one document increase along its columns. Segments are given for both sides or for none.
    """

    q_at: Tensor | None = None
    k_at: Tensor | None = None
    q_in: Tensor | None = None
    k_in: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.q_at is None and self.q_in is None


def lined(x: Tensor) -> Tensor:
    """`x` with channels one after the other, as all kernels here read it; other strides may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()


def floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def expanded(places: Places, rows: int) -> Places:
    """With a line of its own for each row, as kernels read them."""
    tensors = (places.q_at, places.k_at, places.q_in, places.k_in)
    return Places(*(None if x is None else x.expand(rows, -1).contiguous() for x in tensors))


def section(k: Tensor, v: Tensor, ratio: int, pairs: int) -> int:
    """How many (row, head) pairs run side by side: those whose keys and values the cache holds together."""
    bytes_ = max(1, k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size())
    return max(1, min(pairs, max(1, CACHE // bytes_) * ratio))


def schedule(places, tokens, keys, block_m, block_n, window, causal, of_keys=False) -> Tensor | None:
    """Each tile's range (B, tiles, 4) int32 of tiles of the other side, from the least and largest of every tile."""
    if places.plain:
        return None
    device = next(x for x in (places.q_at, places.q_in) if x is not None).device
    q_at, q_in, q_real = _bounds(places.q_at, places.q_in, tokens, block_m, device)
    k_at, k_in, k_real = _bounds(places.k_at, places.k_in, keys, block_n, device)
    (q_low, q_high), (k_low, k_high) = ((low[..., None], high[..., None]) for low, high in (q_at, q_in))
    (n_low, n_high), (m_low, m_high) = ((low[:, None], high[:, None]) for low, high in (k_at, k_in))
    some = (k_low <= m_high) & (m_low <= k_high)
    every = q_real[..., None] & k_real[:, None] & (k_low == k_high) & (m_low == m_high) & (k_low == m_low)
    if causal:
        some, every = some & (n_low <= q_high), every & (n_high <= q_low)
    if window:
        some, every = some & (n_high > q_low - window), every & (n_low > q_high - window)
    if of_keys:
        some, every = some.transpose(1, 2), every.transpose(1, 2)
    first, last = _run(some, whole=True)
    whole, cut = _run(every, whole=False)
    return torch.stack([first, whole, cut, last], -1).to(torch.int32).contiguous()


def _bounds(at, inside, count, block, device):
    """Least and largest (position, document) of the real tokens of each tile (B, tiles), and whether all are real."""
    at = torch.arange(count, device=device)[None] if at is None else at
    inside = torch.zeros_like(at) if inside is None else inside
    at, inside = torch.broadcast_tensors(at, inside)
    short = -count % block
    at, inside = (torch.nn.functional.pad(x, (0, short), value=-1).unflatten(1, (-1, block)) for x in (at, inside))
    real, big = inside >= 0, torch.iinfo(torch.int64).max // 4
    bounds = [(torch.where(real, x, big).amin(2), torch.where(real, x, -big).amax(2)) for x in (at, inside)]
    return *bounds, real.all(2)


def _run(found: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """First True and one past the last (whole), or past the first run of True, along the last dimension."""
    tiles = torch.arange(found.shape[2], device=found.device)
    count = found.shape[2]
    first = torch.where(found, tiles, count).amin(2)
    if whole:
        last = torch.where(found, tiles + 1, 0).amax(2)
    else:
        last = torch.where(~found & (tiles > first[..., None]), tiles, count).amin(2)
    return torch.where(first == count, 0, first), torch.where(first == count, 0, last)


@triton.jit
def turn(pairs, tiles, section):
    """(pair, tile) of this program: sections of pairs one after the other, in each all pairs' first tiles first."""
    program = tl.program_id(0)
    begun = program // (section * tiles) * section
    beside = tl.minimum(section, pairs - begun)
    rest = program - begun * tiles
    return begun + rest % beside, rest // beside


@triton.jit
def keys_of(schedule, row, tile, T, S, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """The range of key tiles that a tile of queries reads."""
    if schedule is not None:
        entry = schedule + (row * tl.cdiv(T, BM) + tile) * 4
        first, whole, cut, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    else:
        begin = tile * BM
        end = tl.minimum(begin + BM, T)
        first, whole, cut, last = 0, 0, S // BN, tl.cdiv(S, BN)
        if CAUSAL:
            cut = tl.minimum(cut, (begin + 1) // BN)
            last = tl.minimum(last, tl.cdiv(end, BN))
        if WINDOW:
            first = tl.maximum(begin - WINDOW + 1, 0) // BN
            whole = tl.cdiv(tl.maximum(end - WINDOW, 0), BN)
    whole = tl.minimum(tl.maximum(whole, first), last)
    return first, whole, tl.minimum(tl.maximum(cut, whole), last), last


@triton.jit
def queries_of(
    schedule, row, tile, T, S, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr
):
    """The range of query tiles that read a tile of keys."""
    if schedule is not None:
        entry = schedule + (row * tl.cdiv(S, BN) + tile) * 4
        first, whole, cut, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    else:
        begin = tile * BN
        end = tl.minimum(begin + BN, S)
        first, whole, cut, last = 0, 0, T // BM, tl.cdiv(T, BM)
        if CAUSAL:
            first = begin // BM
            whole = tl.cdiv(end - 1, BM)
        if WINDOW:
            last = tl.minimum(last, tl.cdiv(end - 1 + WINDOW, BM))
            cut = tl.minimum(cut, (begin + WINDOW) // BM)
    whole = tl.minimum(tl.maximum(whole, first), last)
    return first, whole, tl.minimum(tl.maximum(cut, whole), last), last


@triton.jit
def read(x, at, real, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, BOUND: tl.constexpr):
    """Lines `at` of a (.., SIZE) tensor, as (.., BLOCK); those that are not `real` are zero if BOUND."""
    d = tl.arange(0, BLOCK)
    place = x + at.to(tl.int64)[:, None] * stride + d[None, :]
    if BOUND:
        return tl.load(place, mask=real[:, None] & (d < SIZE)[None, :], other=0.0)
    if SIZE != BLOCK:
        return tl.load(place, mask=(d < SIZE)[None, :], other=0.0)
    return tl.load(place)


@triton.jit
def find(at_row, in_row, columns, count):
    """Positions and documents of columns."""
    at = columns
    if at_row is not None:
        at = tl.load(at_row + columns, mask=columns < count, other=0).to(tl.int32)
    inside = tl.where(columns < count, 0, -1)
    if in_row is not None:
        inside = tl.load(in_row + columns, mask=columns < count, other=-1).to(tl.int32)
    return at, inside


@triton.jit
def visible(near, q_in, k_in, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """Which query sees which key; near: position of the query minus that of the key."""
    sees = (q_in == k_in) & (k_in >= 0)
    if CAUSAL:
        sees = sees & (near >= 0)
    if WINDOW:
        sees = sees & (near < WINDOW)
    return sees
