"""Medusa: heads of the model guess the next tokens at once, and the likeliest combinations of their guesses are a tree.

    tree of n = the n combinations (r_1, .., r_d) of largest a_1[r_1] * .. * a_d[r_d]

a_d[r] says how often the guess of rank r of head d was right where those before it were; it is measured while serving,
so the tree follows the text. Combinations come in the order in which they are added: a smaller tree is the beginning of
a larger one, and what each is worth is known before it is tried (arXiv 2401.10774, 2402.12374).
"""

from collections.abc import Sequence as Items
from heapq import heappop, heappush
from itertools import accumulate

import torch

from models.decoder import Decoder
from models.heads.medusa import Medusa
from serve.scheduler import Sequence
from serve.speculative import Draft, Outputs
from serve.width import LENGTHS, Rate

SIZES = tuple(length - 1 for length in LENGTHS)  # tokens of trees
_RANKS = 8  # guesses of a head
_FORGET = 0.01  # weight of a new observation, once there are many
_PRIOR = 8  # observations that what is said of unknown heads counts for
_REGROW = 64  # observed drafts until the tree is made anew; at first fewer
_OBSERVED = 4  # rows a step learns from: their guesses were right or wrong much as those of others


class MedusaHeads:
    """model: a decoder whose head is `medusa`. accuracy: of each head's ranks, as above; at first a guess."""

    reads = trees = usual = True

    def __init__(self, model: Decoder) -> None:
        if not isinstance(model.head, Medusa):
            raise ValueError(
                f"medusa: the model's head is {type(model.head).__name__}; `python -m jobs.finetune` with "
                "`--head medusa` trains one"
            )
        self.head = model.head
        heads, self._ranks = self.head.config.heads, min(_RANKS, model.config.vocab)
        ranks = [1.0, *(0.35 / (rank + 1) for rank in range(1, self._ranks))]
        self.accuracy = [[0.6 * 0.85**head * share for share in ranks] for head in range(heads)]
        combinations = sum(self._ranks ** (head + 1) for head in range(heads))
        self.widest = sum(size <= combinations for size in SIZES)
        self._outputs: dict[int, Outputs] = {}  # of the last computed tokens, by sequence
        self._made: dict[int, tuple[int, list[list[int]]]] = {}  # known tokens when guesses were made, and those
        self._seen = [0] * heads  # observations of each head
        self._observed, self._due = 0, 4
        self._grow()

    def size(self, width: int) -> int:
        return SIZES[width - 1]

    def gain(self, rate: Rate, width: int) -> float:
        return 1 + self._worth[SIZES[width - 1] - 1]

    def ready(self, rows: int) -> bool:
        return True

    def propose(self, sequences: Items[Sequence], width: int) -> list[Draft | None]:
        drafts: list[Draft | None] = [None] * len(sequences)
        ready = [index for index, sequence in enumerate(sequences) if sequence.id in self._outputs]
        if not ready:
            return drafts
        for index in ready[:_OBSERVED]:
            self._observe(sequences[index])
        if self._observed >= self._due:
            self._due = min(_REGROW, 2 * self._due)
            self._grow()
        nodes, parents = self._nodes[: self.size(width)], self._parents[: self.size(width)]
        x_RD = torch.stack([self._outputs[sequences[index].id].last() for index in ready])
        logits_RHC = self.head.guesses(x_RD, 1 + max(head for head, _ in nodes))
        for index, guesses in zip(ready, logits_RHC.topk(self._ranks).indices.tolist()):
            sequence = sequences[index]
            self._made[sequence.id] = len(sequence.tokens), guesses
            drafts[index] = Draft([guesses[head][rank] for head, rank in nodes], parents)
        return drafts

    def see(self, sequence: Sequence, outputs: Outputs) -> None:
        self._outputs[sequence.id] = outputs

    def forget(self, sequence: Sequence) -> None:
        self._outputs.pop(sequence.id, None)
        self._made.pop(sequence.id, None)

    def _observe(self, sequence: Sequence) -> None:
        """Learn from what came where guesses had been made."""
        known, guesses = self._made.pop(sequence.id, (0, ()))
        self._observed += bool(guesses)
        for head, (ranks, token) in enumerate(zip(guesses, sequence.tokens[known:])):
            accuracy, weight = self.accuracy[head], max(_FORGET, 1 / (_PRIOR + self._seen[head]))
            for rank, guess in enumerate(ranks):
                accuracy[rank] += weight * ((guess == token) - accuracy[rank])
            self._seen[head] += 1
            if token not in ranks:
                break

    def _grow(self) -> None:
        """The tree of the largest size, in the order of what its tokens are worth."""
        self._observed = 0
        self._nodes, self._parents, worth = [], [], []
        waiting: list[tuple[float, int, int, int]] = []  # -worth, head, rank, parent

        def offer(head: int, rank: int, parent: int) -> None:
            if head < len(self.accuracy) and rank < self._ranks:
                before = worth[parent] if parent >= 0 else 1.0
                heappush(waiting, (-before * ranked[head][rank][0], head, rank, parent))

        # Ranks in the order of their accuracy, which need not be that of the ranks.
        ranked = [sorted(((a, -rank) for rank, a in enumerate(row)), reverse=True) for row in self.accuracy]
        offer(0, 0, -1)
        while waiting and len(worth) < SIZES[-1]:
            value, head, rank, parent = heappop(waiting)
            self._nodes.append((head, -ranked[head][rank][1]))
            self._parents.append(parent)
            worth.append(-value)
            offer(head + 1, 0, len(worth) - 1)
            offer(head, rank + 1, parent)
        self._worth = list(accumulate(worth))
