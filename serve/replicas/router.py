"""Which replica gets a request: one that has seen the beginning of its prompt, unless it has much more to do.

What a replica has in its prefix cache is guessed from what it was sent: prompts as chains of blocks, each block's hash
taken over all tokens up to its end. A wrong guess costs a prefill, nothing else, so several gateways need not agree.
Otherwise the better of two random replicas is taken: as good as the best one, and gateways with old numbers do not all
run to the same place.
"""

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence

BLOCK = 16  # tokens
MOST_BLOCKS = 1024  # of a prompt that are looked at
REMEMBERED = 65536  # blocks of a replica


class Router:
    """slack: requests that a replica may have more than the least loaded one, and still be taken for its cache."""

    def __init__(self, slack: int = 8) -> None:
        self.slack = slack
        self.routed, self.matched = 0, 0  # requests, and those that went where their prefix is
        self._seen: dict[str, OrderedDict[int, None]] = {}
        self._random = random.Random()

    def choose(self, prompt: Sequence[int], loads: Mapping[str, int], key: str = "") -> str:
        """The name of one of the replicas in `loads`, which says how many requests each has.

        key: whose prompt it is; caches do not share between keys.
        """
        chain = _chain(prompt, key)
        least = min(loads.values())
        near = {name: self._match(name, chain) for name, load in loads.items() if load <= least + self.slack}
        most = max(near.values())
        if most:
            chosen = min((name for name, match in near.items() if match == most), key=loads.__getitem__)
        else:
            chosen = min(self._random.sample(sorted(loads), min(2, len(loads))), key=loads.__getitem__)
        self.routed += 1
        self.matched += most > 0
        self._remember(chosen, chain)
        return chosen

    def forget(self, name: str) -> None:
        """A replica is gone, and its cache with it."""
        self._seen.pop(name, None)

    def _match(self, name: str, chain: Sequence[int]) -> int:
        """Blocks at the beginning of the prompt that the replica has seen."""
        seen = self._seen.get(name, {})
        return next((count for count, block in enumerate(chain) if block not in seen), len(chain))

    def _remember(self, name: str, chain: Sequence[int]) -> None:
        seen = self._seen.setdefault(name, OrderedDict())
        for block in reversed(chain):  # a block is of no use without those before it, so they are forgotten last
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > REMEMBERED:
            seen.popitem(last=False)


def _chain(prompt: Sequence[int], key: str) -> list[int]:
    chain, last = [], hash(key)
    for start in range(0, min(len(prompt), BLOCK * MOST_BLOCKS) - BLOCK + 1, BLOCK):
        last = hash((last, *prompt[start : start + BLOCK]))
        chain.append(last)
    return chain
