"""Models on disk: our own folders, and Hugging Face's Llama checkpoints both ways."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import models
from models import hub

ROPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {"original_max_position_embeddings": 256, "factor": 4.0},
}


@pytest.fixture
def pick():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def llama(pick, rope="default", **fields):
    kv_heads, group, head_dim = pick.choice([1, 2]), pick.choice([1, 2, 4]), pick.choice([8, 16])
    parameters = {"rope_type": rope, "rope_theta": pick.choice([1e4, 5e5]), **ROPES[rope]}
    if rope == "longrope":
        parameters |= {
            name: [pick.uniform(1, 4) for _ in range(head_dim // 2)] for name in ("short_factor", "long_factor")
        }
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=pick.choice([kv_heads * group * head_dim, 48]),
        intermediate_size=72,
        num_hidden_layers=pick.choice([1, 2]),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        rms_norm_eps=pick.choice([1e-5, 1e-6]),
        rope_parameters=parameters,
        eos_token_id=None,
        **{"tie_word_embeddings": pick.random() < 0.5} | fields,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases say nothing at their initial values
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(parameter, std=0.2)
    return model


def close(ours, theirs):
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-5, f"relative error {error:.2e}"


def greedy(model, ids, steps):
    state, generated = model.init_state(len(ids), ids.shape[1] + steps), []
    for _ in range(steps):
        logits, state = model.logits(ids, state)
        ids = logits[:, -1:].argmax(-1)
        generated.append(ids)
    return torch.cat(generated, 1)


@pytest.mark.parametrize("rope", ROPES)
def test_llama_both_ways(pick, rope, tmp_path):
    theirs = llama(pick, rope, attention_bias=pick.random() < 0.5, mlp_bias=pick.random() < 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = hub.load_hf(tmp_path / "theirs")
    ids = torch.randint(101, (2, pick.choice([5, 40])))
    with torch.no_grad():
        expected = theirs(ids).logits
        close(ours.logits(ids)[0], expected)
        reference = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        assert torch.equal(greedy(ours, ids, 64), reference[:, ids.shape[1] :])
        hub.save_hf(ours, tmp_path / "ours")
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits, expected)
    assert not (set(json.loads((tmp_path / "ours/config.json").read_text())) - set(theirs.config.to_dict()))


@pytest.mark.parametrize(
    "field,value",
    [
        ("hidden_act", "gelu"),
        ("pretraining_tp", 2),
        ("sliding_window", 64),
        ("partial_rotary_factor", 0.5),
        ("some_new_field", 1),
        ("hidden_size", "64"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", True),
        ("rms_norm_eps", [1e-6]),
        ("attention_bias", "no"),
        ("rope_parameters", [1]),
    ],
)
def test_a_field_that_is_not_honoured_is_named(pick, tmp_path, field, value):
    llama(pick).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {field: value}))
    with pytest.raises(ValueError, match=field):
        hub.load_hf(tmp_path)


@pytest.mark.parametrize(
    "field,value", [("stretch", 2.0), ("partial_rotary_factor", 0.5), ("rope_theta", "1e4"), ("factor", None)]
)
def test_rope_fields_are_not_passed_over(pick, tmp_path, field, value):
    llama(pick, "linear").save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["rope_parameters"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=field):
        hub.load_hf(tmp_path)


def test_two_rope_thetas_have_to_agree(pick, tmp_path):
    llama(pick).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    theta = record["rope_parameters"]["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(record | {"rope_theta": theta, "partial_rotary_factor": 1.0}))
    hub.load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(record | {"rope_theta": 2 * theta}))
    with pytest.raises(ValueError, match=f"rope_theta is {2 * theta} beside rope_parameters and {theta} in them"):
        hub.load_hf(tmp_path)


def one_line(raised, path):
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    return message


@pytest.mark.parametrize(
    "name",
    ["embed_tokens", "norm", "layers.0.self_attn.k_proj", "layers.0.mlp.up_proj", "layers.0.input_layernorm"],
)
def test_a_missing_weight_is_named(pick, tmp_path, name):
    llama(pick).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.{name}.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        hub.load_hf(tmp_path)
    assert f"model.{name}.weight is missing" in one_line(raised, tmp_path)


def test_stacked_weights_have_their_own_sizes(pick, tmp_path):
    llama(pick).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk"]
    q, k = (tensors[name] for name in names)
    save_file(
        tensors | dict(zip(names, torch.cat([q, k]).split([len(q) - 2, len(k) + 2]), strict=True)), tmp_path / "x"
    )
    (tmp_path / "x").replace(tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        hub.load_hf(tmp_path)
    assert f"q_proj.weight has shape {(len(q) - 2, q.shape[1])}" in one_line(raised, tmp_path)


def test_quantized_weights_are_refused(pick, tmp_path):
    llama(pick).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is torch\.int8"):
        hub.load_hf(tmp_path)


@pytest.mark.parametrize(
    "file,content",
    [
        ("config.json", b"[1]"),
        ("config.json", b"{"),
        ("config.json", b"\xff"),
        ("config.json", b"[" * 200_000),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}'),
        ("model.safetensors", b""),
        ("model.safetensors", None),
    ],
)
def test_broken_files_are_one_line(pick, tmp_path, file, content):
    llama(pick).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError) as raised:
        hub.load_hf(tmp_path)
    assert file in one_line(raised, tmp_path)


def test_old_spelling_of_rope(pick, tmp_path):
    theirs = llama(pick, "llama3")
    theirs.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    parameters = record.pop("rope_parameters")
    record |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    (tmp_path / "config.json").write_text(json.dumps(record))
    ids = torch.randint(101, (1, 30))
    with torch.no_grad():
        close(hub.load_hf(tmp_path).logits(ids)[0], theirs(ids).logits)


@pytest.mark.parametrize(
    "name,options,reason",
    [
        ("gated_deltanet", {}, "gated_deltanet"),
        ("encoder_decoder", {}, "EncoderDecoder"),
        ("gan", {}, "GAN"),
        ("vit", {}, "ViT"),
        ("decoder", {"pattern": "gqa(positions=nope)"}, "nope"),
        ("decoder", {"pattern": "gqa(positions=rope(fraction=0.5))"}, "fraction"),
    ],
)
def test_what_llama_is_not_cannot_be_written(tmp_path, name, options, reason):
    with pytest.raises(ValueError, match=rf"no Hugging Face model type covers this model \(.*{reason}"):
        hub.save_hf(models.build(name, **options), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_weight_that_llama_lacks_cannot_be_written(tmp_path):
    model = models.build("decoder")
    model.blocks[0].mixer.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer\.sinks"):
        hub.save_hf(model, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_our_folder_round_trip(tmp_path, tied):
    model = models.build("decoder", pattern="gated_deltanet gqa(window=5)", tied=tied).eval()
    hub.save(model, tmp_path / "model", tokenizer=b"{}")
    again = hub.load(tmp_path / "model")
    assert again.config == model.config
    ids = torch.randint(64, (2, 12))
    assert torch.equal(again.logits(ids)[0], model.logits(ids)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_our_folder_keeps_the_dtype(tmp_path, dtype):
    model = models.build("decoder", tied=True).to(dtype).eval()
    model.blocks[0].ffn.float()
    hub.save(model, tmp_path / "model")
    again = hub.load(tmp_path / "model")
    assert again.head.weight is again.embedding.weight
    for name, weight in model.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == weight.dtype and torch.equal(found, weight), name
    assert {p.dtype for p in again.parameters()} == {dtype, torch.float32}


def test_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a model folder nor a run"):
        hub.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        hub.load_hf(tmp_path)
