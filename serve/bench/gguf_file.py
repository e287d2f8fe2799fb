"""A Hugging Face folder of a Llama as the file that llama.cpp reads, in bf16, int8 (q8_0) or int4 (q4_0).

Matrices are rounded with what the `gguf` package has; norms stay fp32. All matrices have the same form, as with ours.
"""

import json
from pathlib import Path

FORMS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(hf: Path, path: Path, form: str) -> None:
    """ImportError when there is no `gguf`."""
    import gguf
    from safetensors import safe_open

    config = json.loads((hf / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    kind = gguf.GGMLQuantizationType[FORMS[form]]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _tokens(writer, hf / "tokenizer.json")
    with safe_open(hf / "model.safetensors", "pt") as stored:
        for name in stored.keys():
            data = stored.get_tensor(name).float().numpy()
            if "q_proj" in name or "k_proj" in name:
                data = _paired(data, heads if "q_proj" in name else groups)
            own = gguf.GGMLQuantizationType.F32 if data.ndim == 1 else kind
            writer.add_tensor(_name(name), gguf.quants.quantize(data, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokens(writer, path: Path) -> None:
    model = json.loads(path.read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_types([1] * len(model["vocab"]))
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in model["merges"]])
    writer.add_add_bos_token(False)


def _name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER[part]}.{kind}"


def _paired(weight, heads: int):
    """llama.cpp turns neighbouring features where Hugging Face turns the two halves of a head."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _theta(config: dict) -> float:
    return config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
