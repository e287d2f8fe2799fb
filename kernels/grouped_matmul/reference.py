"""Products of runs of rows, each with a matrix of its own, the definition."""

import torch
from torch import Tensor


def reference(x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """The first counts[0] rows times weight[0], the next counts[1] times weight[1]...; in fp32 at least."""
    wide = torch.promote_types(x_MD.dtype, torch.float32)
    runs = x_MD.to(wide).split(sizes(counts_E, len(x_MD)))
    products = [run @ weight for run, weight in zip(runs, weight_EDF.to(wide), strict=True)]
    return torch.cat(products).to(x_MD.dtype)


def sizes(counts_E: Tensor, rows: int) -> list[int]:
    """The counts as numbers. Raises where they are not those of so many rows."""
    counts = counts_E.tolist()
    if sum(counts) != rows or min(counts) < 0:
        raise ValueError(f"grouped_matmul: counts_E must add up to the rows of x_MD, {rows}, got {sum(counts)}")
    return counts
