"""What decays between two tokens of a chunk, exactly and without overflow: for one decay per head, and per channel.

Both classes take rows (what reads: queries) and columns (what is read: keys) of chunks, (B, H, n, C, K) each, and give

    pairs   (B, H, n, C, C) for each row and column: row_t . e^(d_{i+1} + ... + d_t) col_i for i <= t, for the first
            row (queries); the second reads before its own token is written: i < t, and with `lag` before it decays.
    since   each row decayed from the chunk's start to t;  until  each column decayed from i to the chunk's end.
    across  the whole chunk's decay, (B, H, n, 1 or K, 1), to multiply a memory (K, V) by.

and `grad` takes the gradients of all of these to those of rows, columns and decay. A gradient of decay is a sum over
the pairs that straddle a token, never a difference of two such sums: nothing cancels.
"""

import torch
from torch import Tensor


def decays(decay: Tensor, masks: tuple[Tensor, Tensor, Tensor] | None, lag: bool = False) -> "ByHead | ByChannel":
    """Of decay (B, H, n, C) or (B, H, n, C, K); masks as `chunks.documents` gives them."""
    return ByHead(decay, masks) if decay.dim() == 4 else ByChannel(decay, masks, lag)


class ByHead:
    """One decay for all channels: differences of running sums, masked before they are exponentiated."""

    def __init__(self, decay: Tensor, masks) -> None:
        g = decay.double().cumsum(-1)  # differences of long sums: the double keeps small ones exact
        size = decay.shape[-1]
        lower = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril()
        since, until = g.exp().to(decay.dtype), (g[..., -1:] - g).exp().to(decay.dtype)
        if masks is not None:
            same, past, future = masks
            lower, since, until = lower & same, since * past, until * future
        between = (g[..., :, None] - g[..., None, :]).to(decay.dtype)
        self._between = between.masked_fill(~lower, -torch.inf).exp()
        self._since, self._until = since[..., None], until[..., None]
        self.across = since[..., -1, None, None]

    def products(self, rows: list[Tensor], columns: list[Tensor]) -> tuple[list, list, list]:
        """pairs[row][column], since[row], until[column]."""
        pairs = []
        for i, row in enumerate(rows):
            between = self._between if i == 0 else self._between.tril(-1)
            pairs.append([(row @ column.mT) * between for column in columns])
        return pairs, [row * self._since for row in rows], [column * self._until for column in columns]

    def grad(self, rows, columns, products, dpairs, dsince, duntil, dacross) -> tuple[list, list, Tensor]:
        """The gradients of each row, of each column, and of decay. dacross (B, H, n, K)."""
        pairs, since, until = products
        drows, dcolumns = [x * self._since for x in dsince], [x * self._until for x in duntil]
        met = 0
        for i, row in enumerate(rows):
            between = self._between if i == 0 else self._between.tril(-1)
            for j, column in enumerate(columns):
                met = met + pairs[i][j] * dpairs[i][j]
                dpair = dpairs[i][j] * between
                drows[i] = drows[i] + dpair @ column
                dcolumns[j] = dcolumns[j] + dpair.mT @ row
        # Of token t: what i < t gives to s >= t.
        ddecay = before(met, -1).tril().sum(-2)
        read = sum((x * g).sum(-1) for x, g in zip(since, dsince, strict=True))
        kept = sum((x * g).sum(-1) for x, g in zip(until, duntil, strict=True))
        ddecay = ddecay + read.flip(-1).cumsum(-1).flip(-1) + before(kept, -1)
        return drows, dcolumns, ddecay + (dacross.sum(-1) * self.across[..., 0, 0])[..., None]


class ByChannel:
    """Decays that differ by channel. e^(-sum) alone may overflow, so products of pairs are made in levels: two
    neighbouring runs of 1, 2, 4 ... tokens meet at their border, decayed from i to the border and from the border to t.
    Each level is one batch of matrix products, and decays are only ever multiplied. C is a power of 2.
    """

    def __init__(self, decay: Tensor, masks, lag: bool) -> None:
        self._masks, self._lag = masks, lag
        gate = decay.exp()[..., None, :]  # (B, H, n, runs, tokens of a run, K)
        one = torch.ones_like(gate)
        # Factors from a run's start to t, with t's own or (lag) without; from i to the run's end; across the run.
        self._levels = [(gate, one if lag else gate, one, gate)]
        while self._levels[-1][0].shape[3] > 1:
            read, asked, kept, across = (x.unflatten(3, (-1, 2)).unbind(4) for x in self._levels[-1])
            read2 = torch.cat([read[0], read[1] * across[0]], -2)
            asked2 = torch.cat([asked[0], asked[1] * across[0]], -2) if lag else read2
            self._levels.append((read2, asked2, torch.cat([kept[0] * across[1], kept[1]], -2), across[0] * across[1]))
        self.across = self._levels[-1][3][:, :, :, 0].mT
        if masks is not None:
            self.across = self.across * masks[1][..., -1, None, None]

    def products(self, rows, columns):
        """As `ByHead.products`."""
        first = torch.stack([(rows[0] * column).sum(-1) for column in columns], -1)
        rest = [torch.zeros_like(first)] * (len(rows) - 1)
        pairs = torch.stack([first, *rest], -2)[..., None, None]  # (B, H, n, runs, row, column, t, i)
        by_row, by_column = torch.stack(rows, 3), torch.stack(columns, 3)  # (B, H, n, row, C, K)
        for level in self._levels[:-1]:
            late, early = self._meeting(level, by_row, by_column)
            met = (late.flatten(-3, -2) @ early.flatten(-3, -2).mT).unflatten(-2, (len(rows), -1))
            met = met.unflatten(-1, (len(columns), -1)).transpose(-3, -2)
            above, below = pairs.unflatten(3, (-1, 2)).unbind(4)
            pairs = torch.cat([torch.cat([above, torch.zeros_like(met)], -1), torch.cat([met, below], -1)], -2)
        pairs, (since, until) = pairs[:, :, :, 0], self._whole(by_row, by_column)
        if self._masks is not None:
            pairs = pairs * self._masks[0][:, :, :, None, None]
        return [list(x.unbind(3)) for x in pairs.unbind(3)], list(since.unbind(3)), list(until.unbind(3))

    def grad(self, rows, columns, products, dpairs, dsince, duntil, dacross):
        """As `ByHead.grad`. Along go the gradients of the logs of the levels' factors: a factor of a run of two is the
        product of two of runs of one, so they are handed down by adding."""
        by_row, by_column = torch.stack(rows, 3), torch.stack(columns, 3)
        dsince, duntil = torch.stack(dsince, 3), torch.stack(duntil, 3)
        dpairs = torch.stack([torch.stack(x, 3) for x in dpairs], 3)  # (B, H, n, row, column, t, i)
        if self._masks is not None:
            same, past, future = self._masks
            dpairs = dpairs * same[:, :, :, None, None]
            dsince, duntil = dsince * past[:, :, :, None, :, None], duntil * future[:, :, :, None, :, None]
            dacross = dacross * past[..., -1, None]
        own = dpairs[:, :, :, 0].diagonal(dim1=-2, dim2=-1)[..., None]  # (B, H, n, column, C, 1)
        dcolumns = own * by_row[:, :, :, :1]
        drows = torch.zeros_like(by_row)
        drows[:, :, :, 0] = (own * by_column).sum(3)
        read, asked, kept, across = self._levels[-1]
        factors = torch.cat([read, asked.expand(-1, -1, -1, len(rows) - 1, -1, -1)], 3) if len(rows) > 1 else read
        drows += dsince * factors
        dcolumns += duntil * kept
        log_read, log_kept = (
            (dsince * by_row * factors)[:, :, :, None],
            (duntil * by_column * kept).sum(3)[:, :, :, None],
        )
        log_across = (dacross * across[:, :, :, 0, 0])[:, :, :, None, None]  # (B, H, n, runs, 1, K)
        # log_read (B, H, n, runs, row, tokens, K), log_kept (B, H, n, runs, tokens, K)
        for level in reversed(self._levels[:-1]):
            late, early = self._meeting(level, by_row, by_column)
            run = late.shape[-2]
            log_read1, log_read2 = log_read.unflatten(-2, (2, run)).unbind(-3)
            log_kept1, log_kept2 = log_kept.unflatten(-2, (2, run)).unbind(-3)
            across1 = log_across + log_read2.sum((-3, -2))[..., None, :]
            across2 = log_across + log_kept1.sum(-2, keepdim=True)
            log_across = torch.stack([across1, across2], 4).flatten(3, 4)
            blocks = dpairs.unflatten(-1, (-1, 2, run))[..., 0, :].unflatten(-3, (-1, 2, run))[..., 1, :, :, :]
            dmet = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, 3)  # (B, H, n, runs/2, row, column, t, i)
            dmet = dmet.transpose(-3, -2).flatten(-2, -1).flatten(-3, -2)
            dlate = (dmet @ early.flatten(-3, -2)).unflatten(-2, (-1, run))
            dearly = (dmet.mT @ late.flatten(-3, -2)).unflatten(-2, (-1, run))
            log_read = torch.stack([log_read1, log_read2 + dlate * late], 4).flatten(3, 4)
            log_kept = torch.stack([log_kept1 + (dearly * early).sum(-3), log_kept2], 4).flatten(3, 4)
            read, asked, kept, _ = level
            factor = torch.stack([read, *[asked] * (len(rows) - 1)], 4).unflatten(3, (-1, 2))[:, :, :, :, 1]
            runs = drows.unflatten(-2, (-1, 2, run)).movedim(4, 3)  # (B, H, n, runs/2, row, 2, run, K)
            runs[..., 1, :, :] += dlate * factor
            runs = dcolumns.unflatten(-2, (-1, 2, run)).movedim(4, 3)
            runs[..., 0, :, :] += dearly * kept.unflatten(3, (-1, 2))[:, :, :, :, 0, None]
        ddecay = log_across[..., 0, :] + (log_read[..., :1, 0, :] if self._lag else log_read[..., 0, :]).sum(-2)
        return list(drows.unbind(3)), list(dcolumns.unbind(3)), ddecay

    def _meeting(self, level, by_row: Tensor, by_column: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of every second run and columns of the run before it, decayed to their border:
        (B, H, n, runs/2, row or column, tokens of a run, K)."""
        read, asked, kept, _ = level
        run = read.shape[-2]
        rows = by_row.unflatten(-2, (-1, 2, run))[..., 1, :, :].movedim(4, 3)
        columns = by_column.unflatten(-2, (-1, 2, run))[..., 0, :, :].movedim(4, 3)
        second = [x.unflatten(3, (-1, 2))[:, :, :, :, 1] for x in (read, asked)]
        factor = torch.stack([second[0], *second[1:] * (rows.shape[4] - 1)], 4)
        return rows * factor, columns * kept.unflatten(3, (-1, 2))[:, :, :, :, 0, None]

    def _whole(self, by_row: Tensor, by_column: Tensor) -> tuple[Tensor, Tensor]:
        read, asked, kept, _ = self._levels[-1]
        factor = torch.cat([read, *[asked] * (by_row.shape[3] - 1)], 3)
        since, until = by_row * factor, by_column * kept
        if self._masks is not None:
            _, past, future = self._masks
            since, until = since * past[:, :, :, None, :, None], until * future[:, :, :, None, :, None]
        return since, until


def before(x: Tensor, dim: int) -> Tensor:
    """Sums of what comes before each place."""
    return x.cumsum(dim).roll(1, dim).index_fill(dim, torch.zeros(1, dtype=torch.int64, device=x.device), 0)
