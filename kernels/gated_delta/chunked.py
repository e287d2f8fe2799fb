"""The gated delta rule in chunks: see `kernels.memory`."""

from torch import Tensor

from kernels import memory, op

NAMES = ("q", "k", "v", "decay", "beta", "state")  # of the arguments, as `memory.grad` calls them


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    decay: Tensor | None,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference`, and what `grad` takes: see `memory.run`."""
    return memory.run(*arguments(q_BTHK, k_BTHK, v_BTHV, decay, beta_BTH, state_BHKV, segments_BT, scale, keep))


def arguments(q_BTHK, k_BTHK, v_BTHV, decay, beta_BTH, state_BHKV, segments_BT, scale, keep) -> tuple:
    """Those of `memory.run`."""
    return q_BTHK, k_BTHK, v_BTHV, decay, None, None, beta_BTH, state_BHKV, segments_BT, scale, keep


def grad(args, saved, grads, needs) -> list[Tensor]:
    """As `memory.grad`; a call that walks its last tokens is short, and is run again."""
    if args[-1] or args[0].shape[1] <= memory.STEPS:
        return op.recompute(chunked, args, grads, needs, again=False)
    found = memory.grad(arguments(*args), saved, grads)
    return [found[name] for name, need in zip(NAMES, needs, strict=False) if need]
