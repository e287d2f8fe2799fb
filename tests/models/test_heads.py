"""Heads that guess further than the next token: their losses by hand, what they may see, drafts that change nothing."""

import pytest
import torch
from contract import same, tokens

import models
from models.decoder import Decoder
from models.heads.medusa import Medusa
from models.state import select

HEADS = ["medusa(heads=3)", "mtp(depth=2)", "mtp(depth=2,form=independent)"]


def trained(head, steps=120):
    """A decoder on its own example, which repeats bigrams and itself, so further tokens can be guessed."""
    torch.manual_seed(0)
    decoder = models.build("decoder", head=head, layers=1, dim=48, vocab=32).train()
    optimizer = torch.optim.Adam(decoder.parameters(), 5e-3)
    history = []
    for step in range(steps):
        total, metrics = decoder(decoder.example(16, step))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in metrics.items()})
    return decoder.eval(), history


@pytest.fixture(scope="module", params=HEADS)
def learnt(request):
    return trained(request.param)


def test_every_guess_is_learnt(learnt):
    _, history = learnt
    for name in history[0].keys():
        assert history[-1][name] < 0.8 * history[0][name], (name, history[0][name], history[-1][name])


@pytest.mark.parametrize("head", HEADS)
def test_padding_inside_documents_changes_no_loss(pick, head):
    """Guesses reach over as many tokens, not columns."""
    decoder = models.build("decoder", head=head).train()
    ids, targets, segments = (torch.randint(n, (1, 12)) for n in (64, 64, 1))
    segments[0, pick.randint(3, 8) :] = 1
    columns = torch.tensor(sorted(pick.sample(range(17), 12)))
    wide = [torch.full((1, 17), fill) for fill in (pick.randrange(64), -100, -1)]
    for some, values in zip(wide, (ids, targets, segments)):
        some[:, columns] = values
    found, expected = (
        decoder(dict(zip(("ids_BT", "targets_BT", "segments_BT"), batch))) for batch in (wide, (ids, targets, segments))
    )
    same(found[0], expected[0], 1e-5)
    for name, value in expected[1].items():
        same(found[1][name], value, 1e-5)


def test_a_head_that_would_see_what_it_guesses_is_refused():
    with pytest.raises(ValueError, match="mtp.pattern"):
        models.build("decoder", head="mtp(pattern=gqa(mask=full))")


def test_medusa_losses_by_hand(pick):
    decoder = models.build("medusa", heads=2, weight=0.7).train()
    for inner in decoder.head.inner:
        torch.nn.init.normal_(inner.weight, std=0.2)
    batch = decoder.example(2, 1)
    ids, targets = batch["ids_BT"], batch["targets_BT"].clone()
    targets[0, 5], segments = -100, torch.tensor([[0] * 20 + [3] * 12, [1] * 30 + [-1] * 2])
    targets[1, 30:] = -100
    total, metrics = decoder({"ids_BT": ids, "targets_BT": targets, "segments_BT": segments})
    x, _, _ = decoder.hidden(ids, None, segments)
    expected = metrics["loss"]
    for k in (1, 2):
        logits = decoder.head.guesses(x)[:, :, k - 1]
        losses = []
        for row in range(2):
            for t in range(32 - k):
                if segments[row, t] == segments[row, t + k] >= 0 and targets[row, t + k] != -100:
                    losses.append(torch.nn.functional.cross_entropy(logits[row, t], targets[row, t + k]))
        same(metrics[f"medusa_{k}"], torch.stack(losses).mean(), 1e-5)
        expected = expected + 0.7 * 0.8**k * torch.stack(losses).mean()
    same(total, expected, 1e-5)


def test_mtp_losses_by_hand(pick):
    """Depth k reads the token k further on and is held against the one after it; the two depths are chained."""
    decoder = models.build("mtp", depth=2, weight=0.4).train()
    head, batch = decoder.head, decoder.example(2, 1)
    ids, targets = batch["ids_BT"], batch["targets_BT"]
    total, metrics = decoder(batch)
    h, at, _ = decoder.hidden(ids)
    embedded, expected = decoder.embed(ids), metrics["loss"]
    for k in (1, 2):
        shorter, length = h[:, : 32 - k], 32 - k
        both = torch.cat([head.x_norms[k - 1](shorter), head.token_norms[k - 1](embedded[:, k:])], -1)
        _, part, _ = decoder.hidden(ids[:, :length])
        h, _ = head.stacks[k - 1](head.mixes[k - 1](both), part)
        logits = torch.nn.functional.linear(head.norms[k - 1](h), head.weight)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, k:].flatten())
        same(metrics[f"mtp_{k}"], loss, 1e-5)
        expected = expected + 0.4 / 2 * loss
    same(total, expected, 1e-5)


def test_mtp_never_sees_what_it_guesses(pick):
    """Changing the tokens after the ones it may read leaves the guess as it was, bit for bit."""
    decoder = models.build("mtp", depth=2).eval()
    ids = tokens(decoder, 1, 20, 0)
    for depth in (0, 1):
        outputs = []
        for changed in (False, True):
            row = ids.clone()
            if changed:
                row[:, 10 + depth + 2 :] = (row[:, 10 + depth + 2 :] + 1) % decoder.config.vocab
            x, at, _ = decoder.hidden(row)
            for k in range(depth + 1):
                x = decoder.head.ahead(x, at, k, decoder.embed(row).roll(-k - 1, 1))
            outputs.append(x[:, :11])
        assert torch.equal(*outputs)


def plain(decoder, ids, steps):
    state, found = decoder.init_state(1, ids.shape[1] + steps), []
    for _ in range(steps):
        logits, state = decoder.logits(ids, state)
        ids = logits[:, -1:].argmax(-1)
        found.append(ids.item())
    return found


def fresh(head, rows):
    return {name: spec.empty(rows, 64) for name, spec in head.state_spec(64).items()}


def guesses(decoder, row):
    """What MTP guesses after the last token of a row, by its definition: every depth over the whole row."""
    x, at, _ = decoder.hidden(row[:, :-1])
    head, h, ids, found = decoder.head, x, row[:, 1:], []
    for depth in range(head.config.depth):
        h = head.ahead(h if head.config.form == "sequential" else x, at, depth, decoder.embed(ids))
        logits = torch.nn.functional.linear(head.norms[depth](h[:, -1]), head.weight)
        found.append(logits.argmax(-1))
        ids = torch.cat([ids[:, 1:], found[-1][:, None]], 1)
    return torch.cat(found)


@pytest.mark.parametrize("options", ["", ",form=independent", ",pattern=gated_deltanet", ",pattern=gqa(window=4)"])
def test_mtp_drafts_from_a_state_what_whole_rows_give(pick, options):
    """Rows that grow by any number of tokens, also by none but one, and rows as long as the guesses."""
    decoder = models.build("decoder", head=f"mtp(depth=3{options})", layers=1, vocab=300).eval()
    ids, state = tokens(decoder, 3, 60, pick.randrange(99)), fresh(decoder.head, 3)
    lengths = torch.zeros(3, dtype=torch.int64)  # outputs that were read
    with torch.no_grad():
        for _ in range(8):
            new = torch.tensor([pick.choice([1, 1, 2, 3, 7]) for _ in range(3)])
            columns = torch.arange(int(new.max()))
            at = (lengths[:, None] + columns).clamp(max=58)
            x, _, _ = decoder.hidden(ids)
            rows = torch.arange(3)[:, None]
            draft, state = decoder.head.draft(
                x[rows, at], ids[rows, at + 1], decoder.embed, state, -(columns >= new[:, None]).long()
            )
            lengths += new
            for row in range(3):
                if lengths[row] >= 3:
                    expected = guesses(decoder, ids[row : row + 1, : lengths[row] + 1])
                    assert draft[row].tolist() == expected.tolist(), (row, lengths)


def drafted(decoder, ids, steps):
    """Greedy decoding in which the head drafts and one call checks: the tokens, and how many calls they took."""
    state = decoder.init_state(1, ids.shape[1] + steps + 8)
    logits, state = decoder.logits(ids, state)
    row, calls = torch.cat([ids, logits[:, -1:].argmax(-1)], 1), 1
    while row.shape[1] < ids.shape[1] + steps:
        x, at, _ = decoder.hidden(row[:, :-1])
        if isinstance(decoder.head, Medusa):
            draft = decoder.head.guesses(x[:, -1]).argmax(-1)
        else:
            draft, _ = decoder.head.draft(x, row[:, 1:], decoder.embed, fresh(decoder.head, 1))
        tried = torch.cat([row[:, -1:], draft], 1)
        logits, kept = decoder.logits(tried, state, keep=tried.shape[1])
        best = logits.argmax(-1)
        right = int((best[:, :-1] == draft).long().cumprod(1).sum())
        state = select(kept, torch.tensor([right + 1]))
        row, calls = torch.cat([row, best[:, : right + 1]], 1), calls + 1
    return row[0, ids.shape[1] :][:steps].tolist(), calls


def test_drafts_change_no_token_and_save_calls(learnt):
    decoder, _ = learnt
    with torch.no_grad():
        for seed in range(3):
            ids = decoder.example(1, 1000 + seed)["ids_BT"][:, :20]
            found, calls = drafted(decoder, ids, 24)
            assert found == plain(decoder, ids, 24)
            assert calls < 24, "no draft was ever right"


def test_a_head_of_a_hybrid(pick):
    decoder = Decoder(
        Decoder.Config(32, 32, 2, "gated_deltanet gqa", head="mtp(pattern=gated_deltanet)", tied=True)
    ).train()
    total, metrics = decoder(decoder.example(2))
    total.backward()
    assert decoder.head.weight is decoder.embedding.weight and {"loss", "mtp_1"} == set(metrics)
