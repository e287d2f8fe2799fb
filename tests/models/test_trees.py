"""Draft trees, over every registered part and on both memories: a node is the last token of its own line, nothing else.

What attention alone remembers reads a tree as it is, other parts run once for each line of it; both by one check.
"""

from dataclasses import replace
from functools import partial

import contract
import pytest
import torch
from test_contract import MEMORIES, SUBJECTS, build

from models.decoder import Decoder
from models.mixers.gated_deltanet import GatedDeltaNet
from models.mixers.gqa import GQA
from models.state import Kept, Pages, select, snapshot
from models.stateful import Stateful


def tree(rows, width, generator):
    """Parents (B, T): chains that fork at random, also at the root."""
    columns_T = torch.arange(width)
    anywhere_BT = (torch.rand(rows, width, generator=generator) * (columns_T + 1)).long() - 1
    goes_on_BT = torch.rand(rows, width, generator=generator) < 0.4
    return torch.where(goes_on_BT, columns_T - 1, anywhere_BT)


def line(parents_T, node):
    """Columns from the root to a node."""
    found = [node]
    while parents_T[found[0]] >= 0:
        found.insert(0, int(parents_T[found[0]]))
    return found


def drafted(decoder, seed, state_of=Decoder.init_state, start=9):
    """Each node's logits are those of its line alone, and a row goes on from any node as if nothing else had been."""
    generator = torch.Generator().manual_seed(seed)
    rows, widths = 3, torch.tensor([9, 4, 1])
    ids, guesses, more = (contract.tokens(decoder, rows, n, seed + n) for n in (start, 9, 5))
    segments = -(torch.arange(9) >= widths[:, None]).long()
    parents = torch.where(segments < 0, 0, tree(rows, 9, generator))
    _, state = decoder.logits(ids, state_of(decoder, rows, start + 14))
    logits, after = decoder.logits(guesses, state, segments, parents_BT=parents)
    contract.real(logits, segments)
    ends = [int(torch.randint(width, (), generator=generator)) for width in widths.tolist()]
    paths = [line(parents[row], end) for row, end in enumerate(ends)]
    counts = torch.tensor([len(paths[0]), len(paths[1]), 0])
    path = torch.tensor([path + [0] * (9 - len(path)) for path in paths])
    going_on, _ = decoder.logits(more, select(after, counts, path))
    for row, width in enumerate(widths.tolist()):
        for node in range(width):
            alone, _ = decoder.logits(torch.cat([ids[row], guesses[row, line(parents[row], node)]])[None])
            contract.same(logits[row, node], alone[0, -1], what=f"node {node} of {parents[row].tolist()}")
        taken = paths[row][: counts[row]]
        alone, _ = decoder.logits(torch.cat([ids[row], guesses[row, taken], more[row]])[None])
        contract.same(going_on[row], alone[0, -5:], what=f"after {taken} of {parents[row].tolist()}")


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_node_is_the_end_of_its_line(subject, memory, seed):
    with torch.no_grad():
        contract.settled(partial(drafted, state_of=MEMORIES[memory], start=6 + seed % 9), build(subject), seed)


def test_which_parts_read_a_tree_as_it_is():
    """The others are right, too, and compute a node once for each line it is on."""
    native = set()
    for subject in SUBJECTS:
        parts = [part for part in build(subject).modules() if isinstance(part, Stateful) and part.kind == "mixer"]
        native |= {type(part).__name__ for part in parts if part.trees}
    expected = "Attention DiffTransformer GQA GatedAttention MLA RNoPESWA RingAttention SlidingWindow"
    assert native == {*expected.split(), "MixtureOfAttentions"}


def test_a_call_with_a_tree_writes_nothing(seed):
    """Pages are as they were until a path is committed."""
    decoder = build("3*gated_deltanet gqa(window=7)")
    generator = torch.Generator().manual_seed(seed)
    ids, guesses = contract.tokens(decoder, 2, 6, seed), contract.tokens(decoder, 2, 8, seed + 1)
    with torch.no_grad():
        _, state = decoder.logits(ids, contract.paged(decoder, 2, 40, 4))
        before = snapshot(state)
        _, after = decoder.logits(guesses, state, parents_BT=tree(2, 8, generator))
        for name, value in snapshot(state).items():
            now, then = (x.pool if isinstance(x, Pages) else x for x in (value, before[name]))
            assert torch.equal(now.nan_to_num(), then.nan_to_num()), name
        changed = snapshot(select(after, torch.tensor([1, 1]), torch.zeros(2, 1, dtype=torch.int64)))
        assert not torch.equal(changed["3.mixer.k"].pool.nan_to_num(), before["3.mixer.k"].pool.nan_to_num())


class IgnoresTheTree(GQA):
    """The guesses of other branches are read, too."""

    def attend(self, q_BTHK, view):
        return super().attend(q_BTHK, replace(view, parents_BT=None))


class ForgetsTheBranch(GatedDeltaNet):
    """A node goes on from the state after the column before it, not after its parent."""

    trees = True

    def forward(self, x_BTD, at, state=None):
        y_BTD, after = super().forward(x_BTD, at, state)
        return y_BTD, {name: Kept(value) for name, value in after.items()} if at.parents_BT is not None else after


class CommitsTheFirstLine(GatedDeltaNet):
    """Whichever path is taken, the first line of the tree is written."""

    def __call__(self, x_BTD, at, state=None):
        y_BTD, after = super().__call__(x_BTD, at, state)
        if at.parents_BT is not None:
            lines_BLK = at.paths.columns_BLK
            paths = replace(at.paths, columns_BLK=lines_BLK[:, :1].expand_as(lines_BLK))
            after = {name: replace(value, paths=paths) for name, value in after.items()}
        return y_BTD, after


@pytest.mark.parametrize("plant", [IgnoresTheTree, ForgetsTheBranch, CommitsTheFirstLine])
def test_a_planted_fault_is_caught(plant):
    with torch.no_grad():
        for seed in range(4):
            drafted(contract.decoder_around(plant.__mro__[1], "mixer", {}, layers=2), seed)
        with pytest.raises(AssertionError):
            for seed in range(4):
                drafted(contract.decoder_around(plant, "mixer", {}, layers=2), seed)


def test_mistakes_of_a_tree_are_named():
    decoder = build("sliding_window")
    ids, chain = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[-1, 0, 1, 2]])
    _, state = decoder.logits(ids, decoder.init_state(1, 90))
    _, after = decoder.logits(ids, state, parents_BT=chain)
    long = torch.arange(40)[None] - 1
    for call, word in (
        (lambda: decoder.logits(ids, state, parents_BT=chain[:, :3]), "of the shape of ids_BT"),
        (lambda: decoder.logits(ids, None, parents_BT=chain), "of a state"),
        (lambda: decoder.logits(ids, state, keep=2, parents_BT=chain), "kept whole"),
        (lambda: decoder.logits(ids, state, parents_BT=chain + 1), "before its own"),
        (lambda: decoder.logits(ids, state, torch.tensor([[0, -1, 0, 0]]), parents_BT=chain), "padding"),
        (lambda: decoder.logits(long * 0, state, parents_BT=long), "windows"),
        (lambda: decoder.logits(ids, after), "select"),
        (lambda: select(after, torch.tensor([1])), "path_BK"),
        (lambda: select(after, torch.tensor([2]), torch.tensor([[0]])), "n_B"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    decoder.logits(long * 0, state, parents_BT=long.clamp(max=20))  # 40 guesses, but no line of more than 32
