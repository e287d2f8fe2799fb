"""The language-model loss: three products in all, against the unfused loss that holds the logits several times."""

from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy, linear

from kernels import linear_cross_entropy
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """One product forward, two backward. Forward alone is without gradients; with them forward makes all three."""

    def unfused(x_ND, weight_CD, targets_N):
        return cross_entropy(linear(x_ND, weight_CD).float(), targets_N)

    def ours(x_ND, weight_CD, targets_N):
        return linear_cross_entropy(x_ND, weight_CD, targets_N).mean()

    sizes = ((8192, 4096, 128256), (16384, 2048, 32000)) if bench.gpu else ((512, 256, 8192), (1024, 256, 1024))
    for tokens, dim, classes in sizes:

        def inputs(tokens=tokens, dim=dim, classes=classes):
            targets = torch.randint(0, classes, (tokens,), device=bench.device)
            return {
                "x_ND": bench.randn(tokens, dim),
                "weight_CD": bench.randn(classes, dim) * dim**-0.5,
                "targets_N": targets,
            }

        yield Case(
            f"N{tokens} D{dim} C{classes}",
            inputs,
            ours,
            2.0 * tokens * dim * classes,
            (tokens + classes) * dim * bench.dtype.itemsize,
            backward=2,
            peers={"unfused": unfused} | ({"compiled": torch.compile(unfused)} if bench.gpu else {}),
        )
