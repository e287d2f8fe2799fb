"""Models on disk: our own folders, and Hugging Face's Llama checkpoints both ways."""

import json
import random

import pytest
import torch
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
    [("hidden_act", "gelu"), ("pretraining_tp", 2), ("sliding_window", 64), ("some_new_field", 1)],
)
def test_a_field_that_is_not_honoured_is_named(pick, tmp_path, field, value):
    llama(pick).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {field: value}))
    with pytest.raises(ValueError, match=field):
        hub.load_hf(tmp_path)


def test_rope_fields_are_not_passed_over(pick, tmp_path):
    llama(pick).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["rope_parameters"]["stretch"] = 2.0
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="stretch"):
        hub.load_hf(tmp_path)


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


def test_what_llama_is_not_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="gated_deltanet"):
        hub.save_hf(models.build("gated_deltanet"), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_our_folder_round_trip(tmp_path, tied):
    model = models.build("decoder", pattern="gated_deltanet gqa(window=5)", tied=tied).eval()
    hub.save(model, tmp_path / "model", tokenizer=b"{}")
    again = hub.load(tmp_path / "model")
    assert again.config == model.config
    ids = torch.randint(64, (2, 12))
    assert torch.equal(again.logits(ids)[0], model.logits(ids)[0])


def test_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a model folder nor a run"):
        hub.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        hub.load_hf(tmp_path)
