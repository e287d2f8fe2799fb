"""Experts that read one text in tokens of their own: what they read, where they are heard, and what it is good for."""

import pytest
import torch
from contract import documents, same

import models
from models.decoder import Decoder
from models.meta.mixture_of_tokenizers import Dictionary, learn
from models.span import Span, localize


def random_text(pick, vocab):
    """A dictionary by chance: any token may be opened."""
    opened = []
    for j in range(pick.randint(1, 9)):
        opened.append(pick.choice([token for token in range(vocab * (j + 1)) if token not in opened]))
    return " ".join(map(str, opened))


def strings(opened, vocab):
    """The bytes of every token."""
    found = [[x] for x in range(vocab)]
    for token in opened:
        found += [[*found[token], x] for x in range(vocab)]
    return found


def read(dictionary, ids, segments=None):
    return dictionary(ids, *localize(torch.zeros_like(ids) if segments is None else segments))


def model_of(pick, vocab=8, experts=None, **options):
    experts = experts or ["bytes", "pairs", random_text(pick, vocab)]
    return models.build("mixture_of_tokenizers", vocab=vocab, experts=experts, **options).eval()


def test_tokens_are_those_of_a_walk(pick):
    """Byte by byte down the tree, for documents with padding anywhere; what is read spells the text."""
    vocab = pick.randint(2, 5)
    dictionary = Dictionary(random_text(pick, vocab), vocab)
    spelled = strings(dictionary.opened, vocab)
    opened = {tuple(spelled[token]): j + 1 for j, token in enumerate(dictionary.opened)}
    ids, segments = torch.randint(vocab, (3, 40)), documents(3, 40, pick.randrange(1 << 30))
    token_BT, inside_BT = read(dictionary, ids, segments)
    for row in range(3):
        begun, document = (), None
        for t in range(40):
            if segments[row, t] < 0:
                assert token_BT[row, t] == -1
                continue
            if segments[row, t] != document:
                begun, document = (), segments[row, t]
            begun = (*begun, int(ids[row, t]))
            if begun in opened:
                assert token_BT[row, t] == -1 and inside_BT[row, t] == opened[begun]
            else:
                assert tuple(spelled[token_BT[row, t]]) == begun and inside_BT[row, t] == 0
                begun = ()


def test_no_token_looks_ahead(pick):
    """Boundaries too: of a shorter text the tokens are the same, however it goes on, and so are the outputs."""
    model = model_of(pick)
    ids, cut = torch.randint(8, (2, 30)), pick.randint(1, 28)
    other = torch.cat([ids[:, :cut], (ids[:, cut:] + torch.randint(1, 8, (2, 30 - cut))) % 8], 1)
    for expert in model.experts:
        for ours, theirs, short in zip(
            read(expert.dictionary, ids), read(expert.dictionary, other), read(expert.dictionary, ids[:, :cut])
        ):
            assert torch.equal(ours[:, :cut], theirs[:, :cut]) and torch.equal(ours[:, :cut], short)
    with torch.no_grad():
        ours, theirs = (model.predict({"ids_BT": x}) for x in (ids, other))
    for name in ours:
        same(ours[name][:, :cut], theirs[name][:, :cut], 1e-5)
        assert (ours[name][:, cut:] - theirs[name][:, cut:]).abs().max() > 1e-3


def test_an_expert_is_heard_from_where_its_token_ends(pick):
    """Between two ends only the beginning of the next token is new, and a token's answer is its stack's."""
    model = model_of(pick)
    ids = torch.randint(8, (1, 30))
    for expert in model.experts:
        token_1T, inside_1T = read(expert.dictionary, ids)
        ends = (token_1T[0] >= 0).nonzero()[:, 0].tolist()
        with torch.no_grad():
            heard, _ = expert(ids, *localize(torch.zeros_like(ids)))
            stack, place = expert.blocks, torch.arange(len(ends))[None]
            tokens = token_1T[:, ends]
            from_tokens = expert.norm(stack(expert.embedding(tokens), Span(place, tokens))[0])[0]
        for n, (start, end) in enumerate(zip(ends, [*ends[1:], 30])):
            for t in range(start, end):
                begun = expert.begun.weight[inside_1T[0, t] - 1] if inside_1T[0, t] else 0.0
                same(heard[0, t], from_tokens[n] + begun, 1e-5)
        for t in range(ends[0] if ends else 30):
            same(heard[0, t], expert.begun.weight[inside_1T[0, t] - 1], 1e-5)


def test_the_gate_is_a_mixture_per_byte(pick):
    """Shares are positive, add up to one and differ from byte to byte; their means are logged, padding left out."""
    model = model_of(pick)
    batch = model.example(3, 1)
    gate = model.predict(batch)["gate_BTE"]
    torch.testing.assert_close(gate.sum(-1), torch.ones(gate.shape[:2]))
    assert (gate > 0).all() and gate.std(1).min() > 0
    batch["targets_BT"] = batch["targets_BT"].masked_fill(torch.rand(3, 32) < 0.5, -100)
    _, metrics = model(batch)
    counted = gate[batch["targets_BT"] != -100].mean(0)
    torch.testing.assert_close(torch.stack([metrics[f"expert_{e}"] for e in range(3)]), counted)


def copied(model, expert, decoder):
    """The decoder with the weights of one expert."""
    weights = {f"blocks.{name}": value for name, value in expert.blocks.state_dict().items()}
    weights |= {"embedding.weight": expert.embedding.weight, "norm.weight": expert.norm.weight}
    decoder.load_state_dict(weights | {"head.weight": model.head.weight})
    return decoder


def test_one_expert_of_bytes_is_a_decoder(pick):
    """Logits, loss and gradients, of packed documents with padding."""
    pattern = pick.choice(["gqa", "gated_deltanet", "gqa lstm"])
    model = model_of(pick, experts=["bytes"], pattern=pattern, layers=2)
    decoder = models.build("decoder", vocab=8, dim=32, layers=2, pattern=pattern).eval()
    copied(model, model.experts[0], decoder)
    segments = documents(3, 32, pick.randrange(1 << 30))
    batch = model.example(3, pick.randrange(1000))
    batch |= {"segments_BT": segments, "targets_BT": batch["targets_BT"].masked_fill(segments < 0, -100)}
    real = (segments >= 0)[..., None]
    same(model.predict(batch)["logits_BTC"] * real, decoder.predict(batch)["logits_BTC"] * real, 1e-5)
    (ours, _), (theirs, _) = model(batch), decoder(batch)
    same(ours, theirs, 1e-5)
    ours.backward(), theirs.backward()
    same(model.experts[0].embedding.weight.grad, decoder.embedding.weight.grad, 1e-5)
    for mine, other in zip(model.experts[0].blocks.parameters(), decoder.blocks.parameters()):
        same(mine.grad, other.grad, 1e-5)


def test_one_expert_of_pairs_is_a_decoder_of_pairs(pick):
    model = model_of(pick, experts=["pairs"])
    decoder = models.build("decoder", vocab=8 * 9, dim=32, layers=1)
    weights = decoder.state_dict()["head.weight"]
    model.head.weight.data = weights[:8].clone()
    expert = model.experts[0]
    decoder.load_state_dict(
        {f"blocks.{name}": value for name, value in expert.blocks.state_dict().items()}
        | {"embedding.weight": expert.embedding.weight, "norm.weight": expert.norm.weight, "head.weight": weights}
    )
    ids = torch.randint(8, (2, 20))
    pairs = 8 + ids[:, ::2] * 8 + ids[:, 1::2]
    with torch.no_grad():
        same(model.predict({"ids_BT": ids})["logits_BTC"][:, 1::2], decoder.logits(pairs)[0][..., :8], 1e-5)


@torch.no_grad()
def test_documents_are_apart(pick):
    """Packed and with padding anywhere, as alone: a token never reaches from one document into the next."""
    model = model_of(pick)
    ids, segments = torch.randint(8, (2, 40)), documents(2, 40, pick.randrange(1 << 30))
    packed = model.predict({"ids_BT": ids, "segments_BT": segments})["logits_BTC"]
    assert packed.isfinite().all()
    for row in range(2):
        for document in segments[row].unique().tolist():
            own = segments[row] == document
            if document >= 0:
                same(packed[row, own], model.predict({"ids_BT": ids[row, own][None]})["logits_BTC"][0], 1e-5)


def trained(steps, **options):
    torch.manual_seed(0)
    model = models.build("mixture_of_tokenizers", **options).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        total, metrics = model(model.example(8, step))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return metrics


def test_words_are_learnt_where_words_are_read():
    """Without a mixer bytes cannot know the word they end, whatever is learnt; an expert that reads words is asked."""
    alone, both = trained(60, experts=["bytes"], pattern="none"), trained(60, pattern="none")
    assert alone["loss"] > 1.2 and both["loss"] < 0.4
    assert both["expert_1"] > both["expert_0"]
    assert trained(60)["loss"] < 0.2


def test_every_parameter_learns_in_one_graph(pick):
    model = model_of(pick).train()
    batch = {"ids_BT": torch.randint(8, (8, 64)), "targets_BT": torch.randint(8, (8, 64))}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for experts in (model, compiled):
        model.zero_grad()
        total, _ = experts(batch)
        total.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().sum() > 0, name
    same(total, model(batch)[0], 1e-5)
    low = model.bfloat16().predict(batch)["logits_BTC"].float()
    expected = model.float().predict(batch)["logits_BTC"]
    assert (low - expected).norm() / expected.norm() < 0.05


def test_parts_that_learn_without_a_gradient_do_so_in_every_expert(pick):
    model = models.build("mixture_of_tokenizers", ffn="moe_v2").train()
    model(model.example(4, seed=pick.randint(0, 99)))
    model.after_step()
    for expert in model.experts:
        assert expert.blocks[0].ffn.bias.any() and not expert.blocks[0].ffn.load.any()


def test_a_dictionary_is_learnt_from_text(pick):
    """Its tokens are what is frequent: the text has fewer of them with every one that is opened."""
    text = torch.tensor(list(b"the cat and the other cat, and then the rat. " * 8))
    counts = []
    for opened in (0, 1, 4, 16, 32):
        dictionary = Dictionary(learn(text, 128, opened), 128)
        assert len(dictionary.opened) == opened
        counts.append(int((read(dictionary, text[None])[0] >= 0).sum()))
    assert counts[0] == len(text) and counts == sorted(counts, reverse=True) and counts[-1] < 0.5 * counts[0]
    assert int(learn(text, 128, 1)) == ord(" ")


@pytest.mark.parametrize(
    "options,word",
    [
        ({"experts": ["words"]}, "pairs"),
        ({"experts": ["3 3"]}, "once"),
        ({"experts": ["40 3"]}, "vocab=16"),
        ({"experts": [""]}, "pairs"),
        ({"experts": []}, "at least one"),
        ({"pattern": "gqa(mask=full)"}, "pattern"),
        ({"layers": 0}, "layers"),
    ],
)
def test_mistakes(options, word):
    with pytest.raises(ValueError, match=word) as error:
        models.build("mixture_of_tokenizers", **options)
    assert "\n" not in str(error.value)


def test_it_is_no_decoder_but_has_its_batch():
    model = models.build("mixture_of_tokenizers", vocab=64)
    assert not isinstance(model, Decoder)
    batch = models.build("decoder").example(2, 0)
    total, metrics = model(batch)
    assert total.isfinite() and {"loss", "expert_0", "expert_1"} == metrics.keys()
