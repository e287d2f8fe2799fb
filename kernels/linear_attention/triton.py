"""Linear attention on a GPU: see `kernels.memory_triton`."""

from torch import Tensor

from kernels import memory, memory_triton, op
from kernels.linear_attention.chunked import NAMES, arguments, chunked

SAVED = 2


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference`, and what `grad` takes: see `memory_triton.run`."""
    return memory_triton.run(*arguments(q_BTHK, k_BTHK, v_BTHV, decay, state_BHKV, segments_BT, scale, keep))


def fake(q_BTHK, k_BTHK, v_BTHV, decay, state_BHKV, segments_BT, scale, keep):
    return memory_triton.empty(q_BTHK, v_BTHV, keep, reads=False, plain=True)


def grad(args, saved, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    if args[-1] or args[0].shape[1] <= memory.STEPS:
        return op.recompute(chunked, args, grads, needs, again=False)
    found = memory_triton.grad(arguments(*args), saved, grads)
    return [found[name] for name, need in zip(NAMES, needs, strict=False) if need]
