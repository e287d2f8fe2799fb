"""Newton's method against the loop it replaces."""

from collections.abc import Iterator

from kernels import para_gru, para_lstm
from kernels.bench import Bench, Case
from kernels.newton_scan.reference import reference


def cases(bench: Bench) -> Iterator[Case]:
    """Bytes of x once and of h once; operations are not counted, as the rounds are not fixed."""
    sizes = ((8, 4096, 2048), (1, 32768, 2048)) if bench.gpu else ((1, 2048, 32), (1, 4096, 32), (1, 32768, 32))
    for run, weights in ((para_gru, 3), (para_lstm, 5)):
        name = run.__name__.removeprefix("para_")
        for rows, tokens, size in sizes:

            def inputs(rows=rows, tokens=tokens, size=size, weights=weights):
                x = bench.randn(rows, tokens, 3, size)
                return {"x_BT3D": x, f"weight_{weights}D": bench.randn(weights, size) * 0.5}

            def loop(x_BT3D, name=name, **weight):
                return reference(x_BT3D, *weight.values(), None, None, 0, name, 0)

            moved = 4 * rows * tokens * size * bench.dtype.itemsize
            yield Case(
                f"{name} B{rows} T{tokens} D{size}", inputs, run, 0, moved, backward=7 / 4,
                peers={"loop": loop} if tokens == min(t for _, t, _ in sizes) else {},
                series=f"{name} tokens" if tokens != 2048 else "", tokens=tokens,
            )  # fmt: skip
