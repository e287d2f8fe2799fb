"""Encoder-decoder by cross memory: what is read once stays in the state, and only there."""

import random

import torch

import models
from models.state import select


def build(seed):
    torch.manual_seed(seed)
    return models.build("encoder_decoder", pattern="gated_deltanet gqa(window=6)", layers=2).eval()


def test_cached_equals_training_pass_and_the_source_matters():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    model = build(seed)
    batch = model.example(5, seed)
    ids, source, count = batch["ids_BT"], batch["source_BS"], batch["source_count_B"]
    with torch.no_grad():
        shared = {"memory": model.encode(source, count), "memory_count": count}
        whole = model.head(*model.hidden(ids, shared=shared)[:2])[0]
        state = model.remember(model.init_state(5, 12), source, count)
        outputs = []
        for start, end in ((0, 5), (5, 6), (6, 12)):
            logits, state = model.logits(ids[:, start:end], state)
            outputs.append(logits)
        assert torch.allclose(torch.cat(outputs, 1), whole, atol=2e-5)
        # Padding of the source is not read, its real tokens are.
        padded = source.clone()
        padded[torch.arange(12) >= count[:, None]] = 7
        again, _ = model.logits(ids, model.remember(model.init_state(5, 12), padded, count))
        assert torch.equal(again, model.logits(ids, model.remember(model.init_state(5, 12), source, count))[0])
        source[:, 0] = (source[:, 0] + 1) % 64
        other, _ = model.logits(ids, model.remember(model.init_state(5, 12), source, count))
        assert not torch.allclose(other, whole, atol=1e-3)


def test_rollback_keeps_the_memory():
    model = build(3)
    batch = model.example(3, 0)
    state = model.remember(model.init_state(3, 20), batch["source_BS"], batch["source_count_B"])
    with torch.no_grad():
        _, kept = model.logits(batch["ids_BT"], state, keep=4)
        _, alone = model.logits(batch["ids_BT"][:, :10], state)
        expected, _ = model.logits(batch["ids_BT"][:, 10:], alone)
        logits, _ = model.logits(batch["ids_BT"][:, 10:], select(kept, torch.tensor([2, 2, 2])))
    assert torch.allclose(logits, expected, atol=2e-5)


def test_it_learns_to_read_backwards():
    torch.manual_seed(0)
    model = models.build("encoder_decoder", layers=1, encoder_layers=1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(200):
        total, _ = model(model.example(16, step))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    # Without the source nothing better than the uniform ln 8 = 2.08 is possible.
    assert sum(losses[-10:]) / 10 < 1.6, losses[-10:]
