"""What this machine can do at most: reading memory and multiplying matrices, and the tokens per second they allow."""

import time
from collections.abc import Callable
from dataclasses import dataclass

BITS = {"fp32": 32, "bf16": 16, "int8": 8.25, "int4": 4.25}  # of a weight, with the scales of its group


@dataclass(frozen=True)
class Limits:
    """read: bytes per second of what no second cache holds. product: operations per second of a bf16 product."""

    read: float
    product: float

    @classmethod
    def measure(cls, threads: int) -> "Limits":
        import torch

        torch.set_num_threads(threads)
        data, square = torch.ones(40 * 2**20), torch.randn(2048, 2048).bfloat16()
        return cls(data.nbytes / _least(lambda: data.sum()), 2 * 2048**3 / _least(lambda: square @ square))

    def rate(self, parameters: int, form: str, rows: int) -> float:
        """Tokens per second: a step reads all weights once and multiplies each of its rows with them."""
        return rows / max(parameters * BITS[form] / 8 / self.read, 2 * parameters * rows / self.product)


def _least(run: Callable[[], object]) -> float:
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)
