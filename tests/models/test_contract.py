"""The decode contract, over every registered part and a hybrid, on contiguous and on paged state."""

import random
from functools import partial

import contract
import pytest
import torch

import models
from models import registry
from models.decoder import Decoder
from models.mixers.gated_deltanet import GatedDeltaNet

# Parts as they come, and the options that change what is remembered.
SUBJECTS = (
    [name for name, _ in contract.parts()]
    + models.names(kind="pattern")
    + ["gqa(window=6)", "3*gated_deltanet gqa(window=7,qk_norm=True)"]
)
MEMORIES = {"contiguous": Decoder.init_state, "paged": partial(contract.paged, size=4)}


def build(subject):
    torch.manual_seed(0)
    if subject in models.names():
        decoder = models.build(subject)
    else:
        decoder = models.build("decoder", pattern=subject, layers=4 if "*" in subject else 2)
    for parameter in decoder.parameters():
        if not parameter.any():  # what starts at zero would hide what it multiplies
            torch.nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


@pytest.fixture
def seed():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return seed


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("check", contract.ON_ANY_MEMORY, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_state(subject, check, memory, seed):
    decoder = build(subject)
    state_of = MEMORIES[memory]
    with torch.no_grad():
        check(decoder, seed, (lambda d, rows, max_len: state_of(d, rows, max_len)))


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_part(subject, check, seed):
    check(build(subject), seed)


@pytest.mark.parametrize("name,kind", contract.parts())
def test_every_option_is_live(name, kind):
    assert contract.live_options(registry.lookup(name), kind) == []


@pytest.mark.parametrize("subject", SUBJECTS)
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
