"""The recurrence on logarithms: bound by memory on a GPU, by exponentials on a CPU."""

from collections.abc import Iterator

from torch.nn.functional import softplus

from kernels import log_scan
from kernels.bench import Bench, Case
from kernels.log_scan.reference import reference


def cases(bench: Bench) -> Iterator[Case]:
    """The minGRU's gates. Backward reads both logs and the output's gradient, and writes two gradients."""
    sizes = ((8, 4096, 2048), (1, 65536, 2048)) if bench.gpu else ((1, 2048, 64), (1, 4096, 64), (1, 32768, 64))
    for rows, tokens, size in sizes:

        def inputs(rows=rows, tokens=tokens, size=size):
            gate = bench.randn(rows, tokens, size)
            return {"log_a_BTD": -softplus(gate), "log_b_BTD": bench.randn(rows, tokens, size) - softplus(-gate)}

        def loop(log_a_BTD, log_b_BTD):
            return reference(log_a_BTD, log_b_BTD, None, None, None, None, None, 0)

        def run(log_a_BTD, log_b_BTD):
            return log_scan(log_a_BTD, log_b_BTD)[::2]

        moved = rows * tokens * size * (3 * bench.dtype.itemsize + 1)
        yield Case(
            f"B{rows} T{tokens} D{size}", inputs, run, 0, moved, backward=5 / 3,
            peers={"loop": loop} if tokens == 2048 and not bench.gpu else {"cumsum": cumsum},
            series="tokens" if tokens != 2048 else "", tokens=tokens,
        )  # fmt: skip


def cumsum(log_a_BTD, log_b_BTD):
    """By cumulative sums (arXiv 2311.06281); it loses digits as the sum of the decays grows."""
    total = log_a_BTD.cumsum(1)
    return total + (log_b_BTD - total).logcumsumexp(1)
