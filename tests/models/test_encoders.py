"""Encoders of text: each is transformers' with the same weights, does what its idea says, and keeps documents apart."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.perceiver import modeling_perceiver

import models
from models import hub
from models.encoders.fnet import FNet, Fourier
from models.encoders.longformer import Longformer
from models.encoders.nystromformer import Nystrom, Nystromformer
from models.encoders.perceiver import Perceiver
from models.span import Span
from models.stateful import Place, Stateful

NAMES = ["fnet", "longformer", "nystromformer", "perceiver"]
SIZES = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
PRECISIONS = [(torch.float64, 1e-8), (torch.float32, 1e-5)]


def close(ours, theirs, tolerance, scale=0.0):
    error = (ours - theirs).abs().max() / max(theirs.abs().max(), scale, 1e-6)
    assert error < tolerance, f"relative error {error:.2e}"


def drawn(model, dtype, std=0.25):
    """`model` with weights that hide nothing: no zeros, no ones."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1) / 2, std=std)
    return model.to(dtype).train()  # there is no dropout


def bert(prefix, layer, qkv="attention.self.{}", out="attention.output"):
    """name of ours -> names of theirs, concatenated, of a layer as BERT's."""
    found, there, here = {}, f"{prefix}.encoder.layer.{layer}", f"blocks.{layer}"
    for kind in ("weight", "bias"):
        if qkv:
            found[f"{here}.mixer.wqkv.{kind}"] = [
                f"{there}.{qkv.format(name)}.{kind}" for name in ("query", "key", "value")
            ]
            found[f"{here}.mixer.wo.{kind}"] = [f"{there}.{out}.dense.{kind}"]
        found[f"{here}.mixer_out_norm.{kind}"] = [f"{there}.{out}.LayerNorm.{kind}"]
        found[f"{here}.ffn.wi.{kind}"] = [f"{there}.intermediate.dense.{kind}"]
        found[f"{here}.ffn.wo.{kind}"] = [f"{there}.output.dense.{kind}"]
        found[f"{here}.ffn_out_norm.{kind}"] = [f"{there}.output.LayerNorm.{kind}"]
    return found


def frame(prefix, layers, head="cls.predictions", transform="transform.dense", norm="transform.LayerNorm", **names):
    found = {"embedding.weight": [f"{prefix}.embeddings.word_embeddings.weight"]}
    for kind in ("weight", "bias"):
        found[f"embedding_norm.{kind}"] = [f"{prefix}.embeddings.LayerNorm.{kind}"]
        found[f"transform.{kind}"] = [f"{head}.{transform}.{kind}"]
        found[f"head_norm.{kind}"] = [f"{head}.{norm}.{kind}"]
    for layer in range(layers):
        found |= bert(prefix, layer, **names)
    return found


def load(ours, mapping, theirs, tables, offset, bias):
    """Their weights in ours; names of ours that got none. tables: of positions, and of the token type added to them."""
    weights, length = dict(theirs.named_parameters()), ours.config.length
    with torch.no_grad():
        state = {name: torch.cat([weights[part] for part in parts]) for name, parts in mapping.items()}
        state["positions.weight"] = weights[tables[0]][offset : offset + length] + weights[tables[1]][0]
        state["bias"] = weights[bias][: ours.config.vocab]
    missing, unknown = ours.load_state_dict(state, strict=False)
    assert not unknown
    return missing


def measured(ours, batch, weights_BTC):
    """name -> logits, where the weights are not 0, and gradients, by name."""
    logits = ours.predict(batch)["logits_BTC"]
    assert logits.isfinite().all()
    (logits * weights_BTC).mean().backward()
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    return found | {"logits": logits * (weights_BTC != 0)}


def same(ours, theirs, mapping, batch, logits, tolerance, tables=None, offset=0, bias=None, real=1.0):
    """Outputs and gradients of ours on `batch` are those that `logits`, theirs, have; where real is 0 they may differ.

    In fp32 ours is as near to what ours is in float64 as theirs is, and near enough where theirs is not.
    """
    weights_BTC = torch.randn_like(logits) * real
    (logits * weights_BTC).mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = {name: torch.cat([gradients[part] for part in parts]) for name, parts in mapping.items()}
    expected["logits"] = logits * (weights_BTC != 0)
    if tables:
        expected["positions.weight"] = gradients[tables[0]][offset : offset + ours.config.length]
        close(expected["positions.weight"].sum(0), gradients[tables[1]][0], 1e-4)
    if bias:
        expected["bias"] = gradients[bias][: ours.config.vocab]
    got = measured(ours, batch, weights_BTC)
    if logits.dtype == torch.float32:
        twin = copy.deepcopy(ours).double()
        twin.zero_grad()
        exact = measured(twin, batch, weights_BTC.double())
    assert expected["logits"].abs().max() > 1e-2
    whole = max(value.abs().max().item() for name, value in expected.items() if name != "logits")
    if logits.dtype == torch.float32:
        scales = {name: whole for name in expected} | {"logits": exact["logits"].abs().max().item()}
        error, other = (
            max(((found[name] - exact[name]).abs().max() / scale).item() for name, scale in scales.items())
            for found in (got, expected)
        )
        assert other < 1e-2 and error < max(1e-5, 4 * other), f"{error:.2e}, theirs {other:.2e}"
        return
    for name, value in expected.items():
        close(got[name], value, tolerance, whole / 100 if tolerance > 1e-8 else 0.0)


def sizes(pick):
    heads, layers = pick.choice([1, 2, 3]), pick.choice([1, 2])
    return pick.randint(25, 40), heads, heads * pick.choice([4, 8]), layers, pick.choice([10, 24])


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
def test_fnet_is_that_of_transformers(pick, dtype, tolerance):
    vocab, _, dim, layers, hidden = sizes(pick)
    rows, tokens = pick.randint(1, 3), pick.randint(1, 17)
    config = transformers.FNetConfig(
        vocab_size=vocab + 1, hidden_size=dim, num_hidden_layers=layers, intermediate_size=hidden,
        max_position_embeddings=20, hidden_dropout_prob=0.0, pad_token_id=vocab,
    )  # fmt: skip
    theirs = drawn(transformers.FNetForMaskedLM(config), dtype)
    ours = FNet(FNet.Config(vocab, dim, layers, hidden, 20, eps=config.layer_norm_eps)).to(dtype)
    mapping = frame("fnet", layers, qkv="", out="fourier.output")
    mapping |= {f"project.{kind}": [f"fnet.embeddings.projection.{kind}"] for kind in ("weight", "bias")}
    tables = ("fnet.embeddings.position_embeddings.weight", "fnet.embeddings.token_type_embeddings.weight")
    assert not load(ours, mapping, theirs, tables, 0, "cls.predictions.bias")
    ids = torch.randint(vocab, (rows, tokens))
    logits = theirs(ids).logits[..., :vocab]
    same(ours, theirs, mapping, {"ids_BT": ids}, logits, tolerance, tables, 0, "cls.predictions.bias")


@pytest.mark.parametrize("exact", [False, True])
def test_nystromformer_is_that_of_transformers(pick, exact):
    """Row by row: theirs begins its inverse with a number of the whole batch. In fp32 its inverse loses digits, in ours
    no more than in theirs."""
    vocab, heads, dim, layers, hidden = sizes(pick)
    landmarks, rows = pick.randint(2, 6), pick.randint(1, 3)
    tokens = landmarks if exact else landmarks * pick.randint(2, 4)
    kernel = pick.choice([3, 5, 9])
    config = transformers.NystromformerConfig(
        vocab_size=vocab + 1, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=hidden, max_position_embeddings=24, segment_means_seq_len=tokens, num_landmarks=landmarks,
        conv_kernel_size=kernel, pad_token_id=vocab, **SIZES,
    )  # fmt: skip
    theirs = drawn(transformers.NystromformerForMaskedLM(config), torch.float64)
    ours = Nystromformer(
        Nystromformer.Config(
            vocab, dim, layers, hidden, 24, eps=config.layer_norm_eps, heads=heads, landmarks=landmarks, kernel=kernel
        )
    ).double()
    mapping = frame("nystromformer", layers)
    tables = tuple(f"nystromformer.embeddings.{name}_embeddings.weight" for name in ("position", "token_type"))
    taps = load(ours, mapping, theirs, tables, 2, "cls.predictions.bias")
    assert taps == [f"blocks.{layer}.mixer.taps" for layer in range(layers)]
    convs = [layer.attention.self.conv.weight for layer in theirs.nystromformer.encoder.layer]
    for name, conv in zip(taps, convs, strict=True):
        ours.get_parameter(name).data.copy_(conv[:, 0, :, 0])
    ids = torch.randint(vocab, (rows, tokens))
    logits = torch.cat([theirs(row[None]).logits[..., :vocab] for row in ids])
    same(ours, theirs, mapping, {"ids_BT": ids}, logits, 1e-6, tables, 2, "cls.predictions.bias")
    for name, conv in zip(taps, convs, strict=True):
        close(ours.get_parameter(name).grad, conv.grad[:, 0, :, 0], 1e-6)
    exactly = logits.detach()
    with torch.no_grad():
        ours, theirs = ours.float(), theirs.float()
        rounded = torch.cat([theirs(row[None]).logits[..., :vocab] for row in ids])
        error = ((rounded - exactly).abs().max() / exactly.abs().max()).item()
        close(ours.predict({"ids_BT": ids})["logits_BTC"], exactly, max(1e-5, 4 * error))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # theirs weighs in fp32 anyway
@pytest.mark.parametrize("some_global", [False, True])
def test_longformer_is_that_of_transformers(pick, dtype, some_global):
    vocab, heads, dim, layers, hidden = sizes(pick)
    rows, tokens, window = pick.randint(1, 3), pick.randint(1, 23), pick.randint(2, 5)
    padded = dtype == torch.float32  # in float64 theirs has gradients of NaN at padding, which it adds itself
    tokens = tokens if padded else 2 * window * pick.randint(1, 2)
    config = transformers.LongformerConfig(
        vocab_size=vocab + 1, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=hidden, max_position_embeddings=50, attention_window=2 * window, pad_token_id=vocab, **SIZES,
    )  # fmt: skip
    theirs = drawn(transformers.LongformerForMaskedLM(config), dtype)
    ours = Longformer(
        Longformer.Config(vocab, dim, layers, hidden, 24, eps=config.layer_norm_eps, heads=heads, window=window)
    ).to(dtype)
    mapping = frame("longformer", layers, "lm_head", "dense", "layer_norm")
    for layer in range(layers):
        there = f"longformer.encoder.layer.{layer}.attention.self"
        for kind in ("weight", "bias"):
            mapping[f"blocks.{layer}.mixer.wq_global.{kind}"] = [f"{there}.query_global.{kind}"]
            parts = [f"{there}.{name}_global.{kind}" for name in ("key", "value")]
            mapping[f"blocks.{layer}.mixer.wkv_global.{kind}"] = parts
    tables = tuple(f"longformer.embeddings.{name}_embeddings.weight" for name in ("position", "token_type"))
    assert not load(ours, mapping, theirs, tables, 0, "lm_head.bias")
    ids = torch.randint(vocab, (rows, tokens))
    count = torch.randint(1, tokens + 1, (rows,)) if padded else torch.full((rows,), tokens)
    count[0] = tokens
    real = torch.arange(tokens) < count[:, None]
    chosen = (torch.rand(rows, tokens) < 0.3) & real
    chosen[0, pick.randrange(tokens)] = True
    if not padded:  # nor may its rows differ in their numbers of global tokens
        chosen = chosen[:1].expand(rows, -1)
    batch = {"ids_BT": ids, "segments_BT": real.long() - 1}
    options = {}
    if some_global:
        batch, options = batch | {"global_BT": chosen}, {"global_attention_mask": chosen.long()}
    else:
        mapping = {name: parts for name, parts in mapping.items() if "_global" not in name}
    positions = torch.arange(tokens).expand(rows, tokens)
    logits = theirs(ids, attention_mask=real.long(), position_ids=positions, **options).logits[..., :vocab]
    same(ours, theirs, mapping, batch, logits, 1e-5, tables, 0, "lm_head.bias", real[..., None])


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
def test_perceiver_is_that_of_transformers(pick, dtype, tolerance):
    vocab, heads, dim, layers, _ = sizes(pick)
    latent_dim, key_dim = heads * pick.choice([2, 6]), heads * pick.choice([4, 5])
    latents, repeats, length = pick.randint(1, 9), pick.randint(1, 2), 20
    widening, rows, tokens = pick.randint(1, 2), pick.randint(1, 3), pick.randint(1, 20)
    config = transformers.PerceiverConfig(
        vocab_size=vocab + 1, d_model=dim, d_latents=latent_dim, num_latents=latents, num_blocks=repeats,
        num_self_attends_per_block=layers, num_self_attention_heads=heads, num_cross_attention_heads=heads,
        qk_channels=key_dim, v_channels=latent_dim, self_attention_widening_factor=widening,
        cross_attention_widening_factor=widening, max_position_embeddings=length, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    queries = {"num_channels": dim, "index_dims": length}
    theirs = nn.Module()
    theirs.model = modeling_perceiver.PerceiverModel(
        config,
        input_preprocessor=modeling_perceiver.PerceiverTextPreprocessor(config),
        decoder=modeling_perceiver.PerceiverBasicDecoder(
            config, latent_dim, output_index_dims=length, num_channels=dim, qk_channels=key_dim, v_channels=dim,
            num_heads=heads, use_query_residual=False, final_project=False,
            trainable_position_encoding_kwargs=queries,
        ),
    )  # fmt: skip
    theirs.head = modeling_perceiver.PerceiverEmbeddingDecoder(config)
    theirs = drawn(theirs, dtype)
    ours = Perceiver(
        Perceiver.Config(
            vocab, dim, layers, widening * latent_dim, length, heads=heads, latents=latents,
            latent_dim=latent_dim, key_dim=key_dim, repeats=repeats,
        )
    ).to(dtype)  # fmt: skip
    mapping = {
        "embedding.weight": ["model.input_preprocessor.embeddings.weight"],
        "positions.weight": ["model.input_preprocessor.position_embeddings.weight"],
        "latents": ["model.embeddings.latents"],
        "asked.weight": ["model.decoder.output_position_encodings.position_embeddings"],
    }
    layered = {f"blocks.{n}": f"model.encoder.self_attends.{n}" for n in range(layers)}
    layered |= {"read": "model.encoder.cross_attention", "ask": "model.decoder.decoding_cross_attention"}
    for here, there in layered.items():
        for kind in ("weight", "bias"):
            mapping[f"{here}.norm.{kind}"] = [f"{there}.attention.self.layernorm1.{kind}"]
            if "blocks" not in here:
                mapping[f"{here}.source_norm.{kind}"] = [f"{there}.attention.self.layernorm2.{kind}"]
            mapping[f"{here}.wq.{kind}"] = [f"{there}.attention.self.query.{kind}"]
            mapping[f"{here}.wkv.{kind}"] = [f"{there}.attention.self.{name}.{kind}" for name in ("key", "value")]
            mapping[f"{here}.wo.{kind}"] = [f"{there}.attention.output.dense.{kind}"]
            mapping[f"{here}.mlp_norm.{kind}"] = [f"{there}.layernorm.{kind}"]
            mapping[f"{here}.mlp.wi.{kind}"] = [f"{there}.mlp.dense1.{kind}"]
            mapping[f"{here}.mlp.wo.{kind}"] = [f"{there}.mlp.dense2.{kind}"]
    weights = dict(theirs.named_parameters())
    state = {name: torch.cat([weights[part] for part in parts]).detach() for name, parts in mapping.items()}
    ours.load_state_dict(state | {"bias": theirs.head.bias[:vocab].detach()})
    ids = torch.randint(vocab, (rows, tokens))
    answers = theirs.model(ids).logits[:, :tokens]
    logits = theirs.head(answers, theirs.model.input_preprocessor.embeddings)[..., :vocab]
    same(ours, theirs, mapping, {"ids_BT": ids}, logits, tolerance, bias="head.bias")


# What each is about.


def at(tokens, segments=None):
    return Span(torch.arange(tokens)[None], segments_BT=segments)


def test_fourier_is_the_real_part_of_both_transforms_and_has_no_parameters(pick):
    mixer, tokens, dim = Fourier(Stateful.Config(), Place(6)), pick.randint(1, 9), 6
    assert not list(mixer.parameters()) and not list(mixer.buffers())
    x = torch.randn(1, tokens, dim, dtype=torch.float64)
    turns = torch.outer(torch.arange(tokens), torch.arange(tokens)).double() / tokens
    channels = torch.outer(torch.arange(dim), torch.arange(dim)).double() / dim
    angle = -2 * torch.pi * (turns[:, None, :, None] + channels[None, :, None, :])  # (t, d, s, e)
    expected = torch.einsum("tdse,bse->btd", angle.cos(), x)
    close(mixer(x, at(tokens))[0], expected, 1e-12)
    padded = F.pad(x, (0, 0, 0, 4), value=3.0)
    segments = -(torch.arange(tokens + 4) >= tokens).long()[None]
    y = mixer(padded, at(tokens + 4, segments))[0]
    close(y[:, :tokens], expected, 1e-12)
    assert not y[:, tokens:].any()


def test_a_chirp_is_exact_on_long_rows(pick):
    count, tokens = pick.randint(3000, 4000), 4100
    x = torch.randn(1, tokens, 2)
    mixer, real = Fourier(Stateful.Config(), Place(2)), torch.arange(tokens) < count
    y = mixer(x, at(tokens, real.long()[None] - 1))[0][:, :count]
    close(y, torch.fft.fft2(x[:, :count].double()).real.float(), 1e-5)


def attention(mixer, x):
    """Softmax attention with the mixer's projections and no convolution."""
    q, k, v = mixer.wqkv(x).unflatten(-1, (3, mixer.config.heads, -1)).permute(2, 0, 3, 1, 4)
    return mixer.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_landmarks_that_are_all_tokens_give_exact_attention(pick):
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    for landmarks, exact in ((4, False), (12, True), (20, True)):
        mixer = Nystrom(Nystrom.Config(2, landmarks, 0, 6), Place(16)).double()
        nn.init.normal_(mixer.wqkv.weight)
        error = (mixer(x, at(12))[0] - attention(mixer, x)).abs().max()
        assert error < 1e-12 if exact else error > 1e-3


def test_landmarks_that_stand_for_their_tokens_give_exact_attention(pick):
    """By the formula: where the tokens of a part are equal, their mean is each of them."""
    parts, each = pick.randint(3, 6), pick.randint(1, 4)
    q, k, v = torch.randn(3, 1, 1, parts, 8, dtype=torch.float64)
    q, k = (4 * torch.eye(8)[:parts] + 0.5 * part for part in (q, k))  # a matrix that has an inverse worth the name
    q, k, v = (part.repeat_interleave(each, 2) for part in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v)
    for landmarks, exact in ((parts, True), (parts - 1, False)):
        mixer = Nystrom(Nystrom.Config(1, landmarks, 0, 20), Place(8)).double()
        error = (mixer.approximate(q, k, v, None) - expected).abs().max()
        assert error < 1e-6 if exact else error > 1e-3


def flops(model, tokens):
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.hidden(ids)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["longformer", "nystromformer", "perceiver"])
def test_cost_is_linear_in_the_length(name):
    model = models.build(name, length=4096)
    costs = [flops(model, tokens) for tokens in (512, 1024, 1536, 2048)]
    steps = [after - before for before, after in zip(costs, costs[1:])]
    assert steps[0] == steps[1] == steps[2] > 0
    if name == "perceiver":  # the depth works on latents: it costs nothing per token
        deeper = models.build(name, length=4096, layers=8)
        assert flops(deeper, 2048) - flops(deeper, 1024) == costs[3] - costs[1]
        assert flops(deeper, 1024) > costs[1]


def reach(model, tokens, **inputs):
    """Which tokens (T, T) the output at each depends on, by their gradients."""
    model.eval()
    x = torch.randn(1, tokens, model.config.dim)
    mixer = model.blocks[0].mixer
    span = Span(torch.arange(tokens)[None], segments_BT=inputs.pop("segments_BT", None), shared=inputs)
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x, span)[0][0].sum(-1), x)[:, 0]
    return jacobian.abs().sum(-1) > 0


def test_longformer_sees_its_window_and_global_tokens(pick):
    tokens, window = pick.randint(10, 30), pick.randint(1, 6)
    model = models.build("longformer", window=window)
    columns = torch.arange(tokens)
    near = (columns[:, None] - columns).abs() <= window
    assert torch.equal(reach(model, tokens), near)
    chosen = torch.rand(1, tokens) < 0.2
    assert torch.equal(reach(model, tokens, global_BT=chosen), near | chosen | chosen.T)


def test_global_tokens_cross_documents_only_when_asked(pick):
    tokens, cut = 20, pick.randint(3, 16)
    segments = (torch.arange(tokens) >= cut).long()[None] + 1
    segments[0, -1] = -1
    chosen = torch.zeros(1, tokens, dtype=torch.bool)
    chosen[0, pick.randrange(19)] = True
    apart = segments != segments.T
    real = (segments >= 0) & (segments.T >= 0)
    for across in (False, True):
        model = models.build("longformer", across=across)
        seen = reach(model, tokens, segments_BT=segments, global_BT=chosen)
        assert torch.equal((seen & apart & real), (chosen | chosen.T) & apart & real & across)


def test_dynamic_makes_hidden_tokens_global(pick):
    """CDLM: what is told of a hidden token depends on tokens far beyond the window."""
    ids, seed = torch.randint(64, (1, 40)), pick.randrange(1000)
    for dynamic in (False, True):
        model = models.build("longformer", layers=1, window=2, masked=0.01, dynamic=dynamic)
        torch.manual_seed(seed)
        (column,), _ = model._draw(ids, None)
        far = ids.clone()
        far[0, (column + pick.randint(3, 37)) % 40] += 1
        losses, told = [], []
        for row in (ids, far):
            torch.manual_seed(seed)
            losses.append(model({"ids_BT": row})[0])
            shown = row.scatter(1, column[None], 64)
            told.append(model.predict({"ids_BT": shown})["logits_BTC"][0, column])
        assert (losses[0] != losses[1]) == dynamic and torch.equal(*told) != dynamic


# What all of them keep.


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_a_row_are_as_if_alone(name, pick):
    model = models.build(name)
    ids = torch.randint(65, (3, 40))
    segments = (torch.rand(3, 40) < 0.1).long().cumsum(1)
    segments = torch.where(torch.rand(3, 40) < 0.15, -1, segments)
    batch = {"ids_BT": ids, "segments_BT": segments}
    if name == "longformer":
        batch["global_BT"] = torch.rand(3, 40) < 0.1
    whole = model.predict(batch)
    for value in whole.values():
        assert value.isfinite().all()
    for row in range(3):
        for document in segments[row].unique():
            if document >= 0:
                here = segments[row] == document
                alone = {key: value[row : row + 1, here] for key, value in batch.items() if key != "segments_BT"}
                for key, value in model.predict(alone).items():
                    close(whole[key][row, here], value[0], 2e-5, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_padding_alone_weigh_nothing(name):
    model = models.build(name)
    batch = {"ids_BT": torch.zeros(2, 9, dtype=torch.int64), "segments_BT": torch.full((2, 9), -1)}
    loss, metrics = model(batch)
    assert loss == 0 and model.weight(batch) == 0 and metrics["masked_accuracy"] == 0
    assert model.predict(batch)["hidden_BTD"].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_example_is_learnt(name):
    torch.manual_seed(0)
    model = models.build(name, vocab=16)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        loss, metrics = model(model.example(16, step))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first = loss.item()
            assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        optimizer.step()
    assert loss < 0.4 * first and metrics["masked_accuracy"] > 0.75, (first, loss, metrics)


def test_loss_is_the_mean_over_hidden_tokens_and_weight_says_how_many(pick, monkeypatch):
    model = models.build("fnet", masked=0.3)
    ids = torch.randint(64, (4, 21))
    segments = torch.where(torch.arange(21) < torch.tensor([[21], [20], [7], [1]]), 0, -1)
    batch, seen = {"ids_BT": ids, "segments_BT": segments}, {}

    def hide(told_BK):
        return torch.full_like(told_BK, 64)

    monkeypatch.setattr(model, "_hide", hide)
    original = model.hidden

    def watched(shown_BT, segments_BT, shared):
        seen["shown"], seen["hidden"] = shown_BT, original(shown_BT, segments_BT, shared)
        return seen["hidden"]

    monkeypatch.setattr(model, "hidden", watched)
    loss, metrics = model(batch)
    masked = seen["shown"] == 64
    assert masked.sum(1).tolist() == [7, 6, 3, 1] and model.weight(batch) == 17
    assert not (masked & (segments < 0)).any() and torch.equal(seen["shown"][~masked], ids[~masked])
    logits = model.tell(seen["hidden"])[masked]
    torch.testing.assert_close(loss, F.cross_entropy(logits, ids[masked]))
    assert metrics["masked_accuracy"] == (logits.argmax(-1) == ids[masked]).float().mean()
    first = seen["shown"]
    model(batch)
    assert not torch.equal(seen["shown"], first)  # drawn anew


def test_hidden_tokens_become_the_mask_another_or_stay():
    torch.manual_seed(0)
    ids = torch.full((400, 100), 5)
    shown = models.build("fnet")._hide(ids)
    assert abs((shown == 64).float().mean() - 0.8) < 0.01
    assert abs((shown == 5).float().mean() - 0.1 - 0.1 / 64) < 0.01
    assert shown.unique().tolist() == list(range(65))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_and_no_graph_break(name):
    torch.manual_seed(0)
    model = models.build(name, layers=1, dim=32).eval()
    batch = {"ids_BT": torch.randint(65, (2, 21))}
    if name == "longformer":
        batch |= {"global_BT": torch.rand(2, 21) < 0.2, "segments_BT": torch.arange(21).expand(2, -1) // 9}
    expected = model.predict(batch)["logits_BTC"]
    compiled = torch.compile(lambda batch: model.predict(batch)["logits_BTC"], fullgraph=True, backend="aot_eager")
    close(compiled(batch), expected, 1e-5)
    got = model.bfloat16().predict(batch)["logits_BTC"]
    assert got.dtype == torch.bfloat16
    close(got.float(), expected, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    model = models.build(name).eval()
    hub.save(model, str(tmp_path / "model"))
    again, batch = hub.load(str(tmp_path / "model")), model.example(2)
    assert again.config == model.config
    assert torch.equal(again.predict(batch)["logits_BTC"], model.predict(batch)["logits_BTC"])
    card = models.card(name)
    assert card["kind"] == "encoder" and card["family"] == "attention" and card["supports"] == ("train", "predict")


OPTIONS = {
    "vocab": 20, "dim": 32, "layers": 1, "hidden": 5, "length": 50, "activation": "relu", "eps": 0.5, "masked": 0.5,
    "heads": 2, "landmarks": 4, "kernel": 3, "steps": 2, "latents": 3, "latent_dim": 32, "key_dim": 32, "repeats": 3,
    "window": 2, "room": 1, "dynamic": True, "across": True,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_live(name):
    base = models.build(name)
    shapes = {key: p.shape for key, p in base.named_parameters()}
    ids = torch.randint(20, (2, 32))
    batch = {"ids_BT": ids, "segments_BT": torch.arange(32).expand(2, -1) // 16}
    if name == "longformer":
        batch["global_BT"] = torch.arange(32).expand(2, -1) % 13 == 0

    def outcome(model):
        torch.manual_seed(3)
        loss, _ = model(batch)
        return torch.cat([model.predict(batch)["hidden_BTD"].flatten(), loss[None]])

    for field in vars(base.config):
        changed = models.build(name, **{field: OPTIONS[field]})
        if {key: p.shape for key, p in changed.named_parameters()} != shapes:
            continue
        changed.load_state_dict(base.state_dict())
        if field == "room":
            with pytest.raises(ValueError, match="room=1"):
                changed(batch)
            continue
        assert (outcome(changed) - outcome(base)).abs().max() > 1e-5, field


@pytest.mark.parametrize(
    "name,options,words",
    [
        ("fnet", {"vocab": 0}, ["vocab=0", "at least 1"]),
        ("fnet", {"length": 0}, ["length=0", "at least 1"]),
        ("fnet", {"masked": 0.0}, ["masked=0.0", "above 0"]),
        ("fnet", {"activation": "silu"}, ["activation", "gelu"]),
        ("nystromformer", {"heads": 5}, ["dim=64", "heads=5"]),
        ("nystromformer", {"kernel": 4}, ["kernel=4", "odd"]),
        ("nystromformer", {"landmarks": 0}, ["landmarks=0"]),
        ("perceiver", {"key_dim": 6}, ["key_dim=6", "heads=4"]),
        ("perceiver", {"latents": 0}, ["latents=0"]),
        ("longformer", {"window": 0}, ["window=0"]),
        ("longformer", {"heads": 3}, ["dim=64", "heads=3"]),
    ],
)
def test_a_mistake_gets_one_clear_line(name, options, words):
    with pytest.raises(ValueError) as error:
        models.build(name, **options)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_cannot_be_are_named(name):
    model, ids = models.build(name, length=8), torch.zeros(1, 9, dtype=torch.int64)
    for segments in (None, torch.zeros_like(ids)):
        with pytest.raises(ValueError, match="9 tokens, length=8"):
            model.predict({"ids_BT": ids} if segments is None else {"ids_BT": ids, "segments_BT": segments})
    with pytest.raises(ValueError, match="vocab=64"):
        model.predict({"ids_BT": ids[:, :3] + 65})
    with pytest.raises(ValueError, match="segments_BT: shape"):
        model.predict({"ids_BT": ids[:, :3], "segments_BT": ids})
    with pytest.raises(ValueError, match="int64"):
        model.predict({"ids_BT": ids.float()})
    if name == "longformer":
        with pytest.raises(ValueError, match="global_BT: shape"):
            model.predict({"ids_BT": ids[:, :3], "global_BT": ids})
