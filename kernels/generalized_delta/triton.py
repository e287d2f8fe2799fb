"""The generalised delta rule on a GPU: see `kernels.memory_triton`."""

from torch import Tensor

from kernels import memory, memory_triton, op
from kernels.generalized_delta.chunked import NAMES, arguments, chunked

SAVED = 4


def forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay_BTHK: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference`, and what `grad` takes: see `memory_triton.run`."""
    return memory_triton.run(
        *arguments(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, a_BTHK, b_BTHK, state_BHKV, segments_BT, scale, keep)
    )


def fake(q_BTHK, k_BTHK, v_BTHV, decay_BTHK, a_BTHK, b_BTHK, state_BHKV, segments_BT, scale, keep):
    return memory_triton.empty(q_BTHK, v_BTHV, keep, reads=True, plain=True)


def grad(args, saved, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    if args[-1] or args[0].shape[1] <= memory.STEPS:
        return op.recompute(chunked, args, grads, needs, again=False)
    found = memory_triton.grad(arguments(*args), saved, grads)
    return [found[name] for name, need in zip(NAMES, needs, strict=False) if need]
