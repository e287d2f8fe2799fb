"""Models on disk: our own folders, and the mechanics of Hugging Face's (test_hub_types.py has the model types)."""

import json

import pytest
import torch
from checkpoints import ROPES, made, rope
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import models
from models import hub


def llama(pick, kind="default", **fields):
    fields = {"head_dim": 8, "attention_bias": False} | fields
    return made(pick, "llama", rope_parameters=rope(pick, 8, kind), **fields)


def close(ours, theirs):
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("kind", ROPES)
@torch.no_grad()
def test_rotary_scalings_both_ways(pick, kind, tmp_path):
    theirs = llama(pick, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = hub.load_hf(tmp_path / "theirs")
    ids = torch.randint(101, (2, 200))
    expected = theirs(ids).logits
    close(ours.logits(ids)[0], expected)
    hub.save_hf(ours, tmp_path / "ours")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits, expected)


@pytest.mark.parametrize(
    "field,value",
    [
        ("hidden_act", "mish"),
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
    "kind,field,value",
    [
        ("llama", "hidden_act", ["silu"]),
        ("llama", "rms_norm_eps", 10**400),
        ("qwen2", "layer_types", [["full_attention"]] * 3),
        ("qwen2", "max_window_layers", "2"),
        ("deepseek_v3", "first_k_dense_replace", "1"),
        ("deepseek_v3", "num_nextn_predict_layers", 1.5),
        ("deepseek_v3", "rope_parameters", "yarn"),
        ("deepseek_v3", "rope_parameters", {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": "1"}),
        ("llama4_text", "moe_layers", 1),
        ("qwen3_next", "mlp_only_layers", "0"),
        ("qwen3_next", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 1e308}),
        ("nemotron_h", "layers_block_type", []),
        ("nemotron_h", "layers_block_type", [["mlp"]]),
        ("recurrent_gemma", "block_types", [["attention"]]),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(pick, tmp_path, kind, field, value):
    made(pick, kind).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {field: value}))
    with pytest.raises(ValueError) as raised:
        hub.load_hf(tmp_path)
    one_line(raised, tmp_path)


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
        ("decoder", {"pattern": "gqa(positions=alibi)"}, "alibi"),
        ("decoder", {"pattern": "gqa gqa(heads=8)"}, r"gqa\(heads=8\)"),
        ("decoder", {"ffn": "swiglu none"}, "none"),
        ("decoder", {"norm": "layer_bias"}, "norm is layer_bias"),
        ("decoder", {"head": "lm(softcap=3)"}, r"lm\(softcap=3\)"),
        ("decoder", {"head": "mtp"}, "mtp"),
        ("decoder", {"pattern": "gqa(scores=ssmax)"}, "ssmax"),
        ("decoder", {"ffn": "swiglu(hidden=48) swiglu"}, "layer 1 has swiglu, there it would be swiglu"),
        ("decoder", {"ffn": "moe(hidden=48) moe"}, "layer 1 has moe, there it would be moe"),
        ("decoder", {"pattern": "gqa(head_dim=8) gqa"}, "layer 1 has gqa, there it would be gqa"),
    ],
)
def test_what_no_type_covers_cannot_be_written(tmp_path, name, options, reason):
    with pytest.raises(ValueError, match=rf"no Hugging Face model type covers this model.*{reason}") as raised:
        hub.save_hf(models.build(name, **options), tmp_path / "new")
    assert not (tmp_path / "new").exists() and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "kind,options",
    [
        ("llama", {}),
        ("llama", {"pattern": "gqa(positions=rope(theta=1e4),bias=True,out_bias=True)", "tied": True}),
        ("mistral", {"pattern": "sliding_window(window=5)"}),
        ("qwen2", {"pattern": "gqa(bias=True)"}),
        ("qwen3", {"pattern": "gqa(qk_norm=True) sliding_window(window=3,qk_norm=True)"}),
        ("phi3", {"pattern": "gqa(positions=rope(fraction=0.5))"}),
        ("smollm3", {"pattern": "gqa gqa(positions=nope)"}),
        ("mixtral", {"ffn": "moe"}),
        ("mamba2", {"pattern": "mamba_ssd", "ffn": "none"}),
        (
            "nemotron_h",
            {
                "pattern": "mamba_ssd(group_norm=True) gqa(positions=nope) none",
                "ffn": "2*none squared_relu",
                "layers": 3,
            },
        ),
    ],
)
@torch.no_grad()
def test_our_own_models_find_their_type(tmp_path, kind, options):
    model = models.build("decoder", **options).eval()
    hub.save_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    ids = torch.randint(64, (2, 12))
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model.logits(ids)[0])


def test_a_type_that_is_asked_for(tmp_path):
    model = models.build("decoder", pattern="gqa(window=5)")
    hub.save_hf(model, tmp_path / "mistral", "mistral")
    with pytest.raises(ValueError, match=r"llama: layer 0 has gqa\(window=5\), there it would be gqa"):
        hub.save_hf(model, tmp_path / "llama", "llama")
    with pytest.raises(ValueError, match="model_type 'lama' is not known; known: .*llama"):
        hub.save_hf(model, tmp_path / "lama", "lama")


def test_a_weight_that_a_type_lacks_cannot_be_written(tmp_path):
    model = models.build("decoder")
    model.blocks[0].mixer.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer\.sinks"):
        hub.save_hf(model, tmp_path)


def test_weights_that_must_be_one_value(tmp_path):
    options = {"pattern": "gqa(qk_norm=True)", "ffn": "moe_v2(normalize=False,weigh=input,hidden=64)"}
    model = models.build("decoder", **options)
    hub.save_hf(model, tmp_path / "a", "llama4_text")
    model.blocks[0].mixer.q_norm.weight.data[0] = 2
    with pytest.raises(ValueError, match=r"mixer\.q_norm\.weight has no place in it unless all of it is 1"):
        hub.save_hf(model, tmp_path / "b", "llama4_text")


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
