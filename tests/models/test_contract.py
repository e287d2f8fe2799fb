"""The decode contract, over every registered part and a hybrid, on contiguous and on paged state."""

from functools import partial

import contract
import pytest
import torch

import models
from models import registry
from models.decoder import Decoder
from models.mixers.gated_deltanet import GatedDeltaNet
from models.state import select

# Parts as they come, and the options that change what is remembered.
AHEAD = contract.ahead()
SUBJECTS = (
    [name for name, _ in contract.parts() if name not in AHEAD]
    + models.names(kind="pattern")
    + ["gqa(window=6)", "3*gated_deltanet gqa(window=7,qk_norm=True)"]
)
MEMORIES = {"contiguous": Decoder.init_state, "paged": partial(contract.paged, size=4)}


def build(subject, **sizes):
    torch.manual_seed(0)
    if subject in models.names():
        decoder = models.build(subject, **sizes)
    else:
        decoder = models.build("decoder", **{"pattern": subject, "layers": 4 if "*" in subject else 2, **sizes})
    for parameter in decoder.parameters():
        if not parameter.any():  # what starts at zero would hide what it multiplies
            torch.nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("check", contract.ON_ANY_MEMORY, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_state(subject, check, memory, seed):
    decoder = build(subject)
    state_of = MEMORIES[memory]
    with torch.no_grad():
        contract.settled(partial(check, state_of=state_of), decoder, seed)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_part(subject, check, seed):
    contract.settled(check, build(subject), seed)


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_at_other_sizes(subject, seed, monkeypatch):
    """Deeper, wider, longer, on both memories, several draws of each check."""
    monkeypatch.setattr(contract, "TOKENS", 71)
    decoder = build(subject, dim=96, layers=5)
    for draw in range(seed, seed + 3):
        for check in contract.ON_ANY_MEMORY:
            for state_of in MEMORIES.values():
                with torch.no_grad():
                    contract.settled(partial(check, state_of=state_of), decoder, draw)
        for check in (contract.documents_apart, contract.rows_move, contract.no_future_leak):
            contract.settled(check, decoder, draw)


@pytest.mark.parametrize("check", contract.SEES_AHEAD, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", AHEAD)
def test_part_that_sees_ahead(subject, check, seed):
    contract.settled(check, build(subject), seed)


@pytest.mark.parametrize("name,kind", contract.parts())
def test_every_option_is_live(name, kind):
    assert contract.live_options(registry.lookup(name), kind) == []


@pytest.mark.parametrize("subject", SUBJECTS + AHEAD)
def test_example_is_learnt(subject):
    decoder = build(subject).train()
    optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
    losses = []
    for step in range(30):
        total, _ = decoder(decoder.example(8, step))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.7 * losses[0]


class Walked(GatedDeltaNet):
    """Leaves `keep` to the base class, which walks the tokens one by one."""

    keeps = False


def test_walking_keeps_what_the_kernels_keep(seed):
    with torch.no_grad():
        contract.kept_states(contract.decoder_around(Walked, "mixer", {}, layers=2), seed)


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_a_state_cannot_hold_is_refused(memory):
    """Silent corruption otherwise: a ring smaller than its window, a rollback past what windows keep."""
    decoder, state_of = build("sliding_window"), MEMORIES[memory]
    ids = torch.zeros(1, 60, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_len"):
        decoder.logits(ids, state_of(decoder, 1, 10))
    with pytest.raises(ValueError, match="keep=48"):
        decoder.logits(ids, state_of(decoder, 1, 200), keep=48)
    decoder.logits(ids, state_of(decoder, 1, 200), keep=32)
    with pytest.raises(ValueError, match="max_len"):
        build("gqa").logits(ids, state_of(build("gqa"), 1, 10))


def test_keep_and_documents():
    """A document that begins inside the kept columns is refused, also in a fresh row; one before them is not."""
    decoder = build("gqa")
    ids, segments = contract.tokens(decoder, 1, 8, 0), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="document begins"):
        decoder.logits(ids, decoder.init_state(1, 20), segments, keep=5)
    with torch.no_grad():
        _, kept = decoder.logits(ids, decoder.init_state(1, 20), segments, keep=3)
        _, alone = decoder.logits(ids[:, 4:6], decoder.init_state(1, 20), segments[:, 4:6])
        more = contract.tokens(decoder, 1, 3, 1)
        ours, _ = decoder.logits(more, select(kept, torch.tensor([1])))
        contract.same(ours, decoder.logits(more, alone)[0])


def test_mistakes_of_a_call_are_named():
    decoder = build("gated_deltanet")
    ids = torch.zeros(1, 3, dtype=torch.int64)
    state = decoder.init_state(1, 9)
    _, kept = decoder.logits(ids, state, keep=2)
    for call, word in (
        (lambda: decoder.logits(ids + 64), "vocab"),
        (lambda: decoder.logits(ids[:, :0]), "at least one"),
        (lambda: decoder.logits(ids, {}), "init_state"),
        (lambda: decoder.logits(ids, kept), "select"),
        (lambda: select(kept, torch.tensor([3])), "n_B"),
        (lambda: select(kept, torch.tensor([-1])), "n_B"),
        (lambda: decoder.logits(ids, state, keep=4), "keep=4"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
