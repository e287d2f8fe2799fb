"""Starting a Triton kernel: on the device of its tensors, and not at all where there is nothing to do."""

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # on CPU tensors, one program after the other


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Run `kernel[grid](*args, **meta)`. Put the largest count first: only that may pass 65,535."""
    if 0 in grid:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"Triton kernels need a GPU, or TRITON_INTERPRET=1 for tensors on {device.type}")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **meta)


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot for operands of a caller's dtype: what the caller gave is not rounded to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
