"""A sequence sharded over the ranks of a process group: attention and linear recurrences as if it were on one."""

from kernels.ring.attention import ring_attention
from kernels.ring.layout import positions, shard, unshard
from kernels.ring.recurrence import ring_recurrence

__all__ = ["positions", "ring_attention", "ring_recurrence", "shard", "unshard"]
