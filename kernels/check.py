"""Argument checks that all ops share: one clear line for a mistake."""

import torch
from torch import Tensor


def shape(op: str, name: str, x: Tensor, want: tuple[int | None, ...], what: str) -> None:
    """Raise unless `x` is a tensor of shape `want` (None: any size), described to the user as `what`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {what}, got {type(x).__name__}")
    if x.dim() != len(want) or any(w is not None and w != n for n, w in zip(x.shape, want, strict=True)):
        raise ValueError(f"{op}: {name} must be {what}, got shape {tuple(x.shape)}")


def floating(op: str, name: str, x: Tensor) -> None:
    """Raise unless `x` holds floating-point numbers."""
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")


def whole(op: str, name: str, x: Tensor) -> None:
    """Raise unless `x` holds 64-bit integers."""
    if x.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {x.dtype}")


def keep(op: str, value: int, tokens: int) -> None:
    """Raise unless a call of `tokens` tokens can return its state before the last `value` of them."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: keep must be an int, got {type(value).__name__}")
    if not 0 <= value <= tokens:
        raise ValueError(f"{op}: keep={value}: a call of {tokens} tokens can keep 0..{tokens}")


def window(op: str, value: int) -> None:
    """Raise unless `value` is how many tokens a query may read, or 0 for all."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{op}: window={value!r} must be 0 (none) or a number of tokens")


def segments(op: str, value: Tensor | None, rows: int, tokens: int) -> None:
    """Raise unless `value` is None or local segment numbers of `rows` rows and `tokens` tokens."""
    if value is not None:
        shape(op, "segments_BT", value, (rows, tokens), f"(B={rows}, T={tokens})")
        whole(op, "segments_BT", value)


def dtype(op: str, name: str, x: Tensor, *allowed: torch.dtype) -> None:
    """Raise unless `x` is of one of the dtypes."""
    if x.dtype not in allowed:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, allowed))}, got {x.dtype}")


def device(op: str, name: str, x: Tensor, other: Tensor) -> None:
    """Raise unless `x` is where `other`, the op's first argument, is."""
    if x.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device}, got {x.device}")
