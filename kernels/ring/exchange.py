"""Messages between the ranks of a process group. A rank is its number in the group."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_agreed: set[tuple] = set()


def name_of(op: str, group: dist.ProcessGroup | str) -> str:
    """What torch ops take in a group's place."""
    if isinstance(group, str):
        return group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a ProcessGroup of torch.distributed or its name, got {group!r}")
    return group.group_name


def resolve(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


class Exchange:
    """Tensors under way, each with the rank it goes to or comes from, from here on until `wait`.

    Both sides post in the same order: what a rank sends to another arrives there in the order of sending. Every rank
    of a group posts its batches in the same order too, empty ones aside, or NCCL's would wait for each other.
    """

    def __init__(
        self, group: dist.ProcessGroup, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        self.sends, self.receives = [(to, x.contiguous()) for to, x in sends], receives  # held while they travel
        ways = ((dist.isend, self.sends), (dist.irecv, receives))
        ops = [
            dist.P2POp(way, _plain(x), group=group, group_peer=rank)
            for way, pairs in ways
            for rank, x in pairs
            if x.numel()
        ]
        self.works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> list[Tensor]:
        """What came, in the order of `receives`; on a GPU the current stream waits, not this thread."""
        for work in self.works:
            work.wait()
        return [x for _, x in self.receives]


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` of every rank, stacked in front."""
    every = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(every, x.contiguous(), group=group)
    return torch.stack(every)


def agree(op: str, group: dist.ProcessGroup, device: torch.device, **numbers: int) -> None:
    """ValueError on every rank unless all ranks give the same numbers.

    On a GPU this is asked once of the same numbers: reading the answer there waits for all that was queued before.
    """
    signature = (group.group_name, op, *numbers.items())
    if device.type != "cpu" and signature in _agreed:
        return
    every = gather(torch.tensor(list(numbers.values()), device=device), group).tolist()
    for name, values in zip(numbers, zip(*every, strict=True), strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"{op}: {name} must be the same on every rank of the group, got {list(values)}")
    if device.type != "cpu":
        _agreed.add(signature)


def _plain(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x
