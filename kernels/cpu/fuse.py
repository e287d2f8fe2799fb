"""Ops of a tape that one pass can do: what a product ends with is done to its sums, while they are at hand.

Every rule gives the bits of the ops it stands for.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten, own = torch.ops.aten, torch.ops.edifice_cpu
Node = tuple[Any, list, list[int]]  # an op, its arguments in the order of its schema, the slots of what it returns
_PANEL = 32  # gates fill pairs of panels


def fused(
    nodes: list[Node], shapes: Callable[[int], Tensor], slots: Callable[[list], list[int]], kept: set[int]
) -> list[Node]:
    """The nodes with fewer passes.

    shapes: of a slot the tensor. slots: those among arguments. kept: whose memory others look at, or is written.
    """
    maker = {result: index for index, (_, _, results) in enumerate(nodes) for result in results}
    readers = Counter(slot for _, args, _ in nodes for slot in slots(args))
    gone: set[int] = set()

    def product(slot: int) -> int | None:
        """The node of a plain product that `slot` is, and nobody else reads."""
        index = maker.get(slot)
        plain = index is not None and nodes[index][0] is own.packed_linear.default and index not in gone
        if not plain or readers[slot] != 1 or slot in kept or kept.intersection(slots(nodes[index][1])):
            return None
        return index

    found = list(nodes)
    for index, (func, args, results) in enumerate(nodes):
        if func is aten.add.Tensor and args[2] == 1 and len(slots(args[:2])) == 2:
            for stream, sums in ((args[0], args[1]), (args[1], args[0])):
                at = product(sums)
                if at is not None and _alike(shapes(stream), shapes(sums)):
                    found[index] = (own.packed_linear_add.default, [*nodes[at][1], stream], results)
                    gone.add(at)
                    break
        elif func is own.swiglu.default:
            halves = maker.get(args[0])
            if halves is None or nodes[halves][0] is not aten.chunk.default or nodes[halves][2] != args:
                continue
            whole, parts, dim = nodes[halves][1]
            at = product(whole)
            alone = all(readers[half] == 1 and half not in kept for half in args)
            if at is None or not alone or parts != 2 or dim not in (-1, shapes(whole).dim() - 1):
                continue
            if shapes(whole).shape[-1] % _PANEL == 0:
                found[index] = (own.packed_swiglu.default, nodes[at][1], results)
                gone |= {at, halves}
        elif func is aten.index_put_.default and results == args[:1] and _is_page(args, shapes):
            pool, (page, offset), entries, _ = args
            found[index] = (own.write_pages.default, [pool, page, offset, entries], [])
    return [node for index, node in enumerate(found) if index not in gone]


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype


def _is_page(args: list, shapes: Callable[[int], Tensor]) -> bool:
    """pool[page, offset] = entries, all of whole lines that follow one another."""
    pool, places, entries, accumulate = args
    if accumulate or len(places) != 2 or any(place is None for place in places):
        return False
    page, offset = map(shapes, places)
    whole = page.shape + shapes(pool).shape[2:]
    return (
        page.dtype == offset.dtype == torch.int64
        and page.shape == offset.shape
        and page.dim() == 2
        and shapes(pool).is_contiguous()
        and shapes(entries).shape == whole
        and shapes(entries).dtype == shapes(pool).dtype
    )
