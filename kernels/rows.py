"""Kernels that hold whole rows of the last dimension on chip: the shape of their tiles."""

import triton


def tile(size: int) -> tuple[int, int, int]:
    """Channels and rows of a tile, and warps: about 4,096 elements, 16 of a thread."""
    block = triton.next_power_of_2(max(size, 1))
    return block, max(1, min(32, 4096 // block)), min(16, max(4, block // 512))
