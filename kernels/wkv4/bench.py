"""WKV of RWKV-4: a few multiplications per number moved."""

from collections.abc import Iterator

from kernels import wkv4
from kernels.bench import Bench, Case
from kernels.wkv4.reference import reference


def cases(bench: Bench) -> Iterator[Case]:
    """k and v in, y out."""
    sizes = ((8, 4096, 2048),) if bench.gpu else ((1, 2048, 256), (1, 4096, 128), (1, 32768, 128))
    for rows, tokens, size in sizes:

        def inputs(rows=rows, tokens=tokens, size=size):
            k, v = (bench.randn(rows, tokens, size) for _ in range(2))
            return {"k_BTD": k, "v_BTD": v, "decay_D": -bench.randn(size).abs(), "bonus_D": bench.randn(size)}

        def loop(k_BTD, v_BTD, decay_D, bonus_D):
            return reference(k_BTD, v_BTD, decay_D, bonus_D, None, None, 0)

        moved = 3 * rows * tokens * size * bench.dtype.itemsize
        yield Case(
            f"B{rows} T{tokens} D{size}", inputs, wkv4, 0, moved, backward=2.0,
            peers={"loop": loop} if tokens == 2048 else {},
            series="T" if tokens != 2048 and not bench.gpu else "", tokens=tokens,
        )  # fmt: skip
