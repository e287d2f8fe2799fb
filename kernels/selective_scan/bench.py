"""The selective scan: on a GPU bound by memory if the states stay on chip; on a CPU by the exponentials."""

from collections.abc import Iterator

import torch
from torch.nn.functional import softplus

from kernels import selective_scan
from kernels.bench import Bench, Case
from kernels.selective_scan.reference import reference

STATES = 16


def cases(bench: Bench) -> Iterator[Case]:
    """Seven operations for each state of each token: two products and an exponential, two to step, two to read."""
    sizes = ((4, 4096, 2048), (1, 32768, 2048)) if bench.gpu else ((1, 2048, 32), (1, 4096, 32), (1, 32768, 32))
    for rows, tokens, size in sizes:

        def inputs(rows=rows, tokens=tokens, size=size):
            a = -torch.arange(1, STATES + 1, device=bench.device, dtype=torch.float32).expand(size, -1)
            return {
                "x_BTD": bench.randn(rows, tokens, size),
                "step_BTD": softplus(bench.randn(rows, tokens, size) - 3),
                "a_DN": a.contiguous(),
                "b_BTN": bench.randn(rows, tokens, STATES),
                "c_BTN": bench.randn(rows, tokens, STATES),
            }

        def loop(x_BTD, step_BTD, a_DN, b_BTN, c_BTN):
            return reference(x_BTD, step_BTD, a_DN, b_BTN, c_BTN, None, None, None, 0, "chunked")

        peers = {}
        if not bench.gpu and tokens == 2048:
            peers = {name: named(name) for name in ("cumsum", "hillis_steele")} | {"loop": loop}
        moved = rows * tokens * (3 * size + 2 * STATES) * bench.dtype.itemsize
        yield Case(
            f"B{rows} T{tokens} D{size} N{STATES}", inputs, selective_scan, 7 * rows * tokens * size * STATES, moved,
            backward=2.5, peers=peers, series="tokens" if tokens != 2048 else "", tokens=tokens,
        )  # fmt: skip


def named(scan: str):
    """The op with another algorithm for the recurrence."""
    return lambda **x: selective_scan(**x, scan=scan)
