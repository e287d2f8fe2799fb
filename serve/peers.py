"""Engines that decode the same checkpoint, each run alone in a process of its own: `python -m serve.peers NAME ...`.

One JSON line comes out: for each number of requests the seconds of a run of one new token and of a run of `--tokens`,
the medians of `--rounds`. What lies between is decoding; the first is the time to a first token.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts and new tokens -> completions, greedy


def edifice(folder: Path, form: str, threads: int) -> Generate:
    from serve.engine import load
    from serve.sampler import Sampling

    dtype = form if form in ("fp32", "bf16") else "bf16"
    engine = load(str(folder / "edifice"), dtype=dtype, weights=form, max_len=512)
    engine.call.replay.after = 1

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        found = engine.generate(prompts, Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
        return [result.tokens for result in found]

    return generate


def transformers(folder: Path, form: str, threads: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[form]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype).eval()

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    return generate


def vllm(folder: Path, form: str, threads: int) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder / "hf"), dtype={"fp32": "float32", "bf16": "bfloat16"}[form], skip_tokenizer_init=True,
        max_model_len=512, max_num_seqs=32, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in found]

    return generate


def llama_cpp(folder: Path, form: str, threads: int) -> Generate:
    from llama_cpp import Llama

    llama = Llama(str(folder / f"{form}.gguf"), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            llama.reset()
            own = []
            for token in llama.generate(prompt, temp=0.0, reset=True):
                own.append(token)
                if len(own) == tokens:
                    break
            found.append(own)
        return found

    return generate


PEERS = {"edifice": edifice, "transformers": transformers, "vllm": vllm, "llama_cpp": llama_cpp}
ALONE = {"llama_cpp"}  # answer one request at a time


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    """Prompts that differ from their first token on."""
    return [[(1 + 7919 * row + 31 * i * i) % (vocab - 8) + 4 for i in range(length)] for row in range(rows)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.peers", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("form", choices=("fp32", "bf16", "int8", "int4"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    vocab = json.loads((args.folder / "hf" / "config.json").read_text())["vocab_size"]
    generate = PEERS[args.name](args.folder, args.form, args.threads)
    found = {}
    for rows in args.rows if args.name not in ALONE else [1]:
        given = prompts(rows, args.prompt, vocab)
        completions = generate(given, args.tokens)  # warms up, and is compared
        times: dict[int, list[float]] = {1: [], args.tokens: []}
        for _ in range(args.rounds):
            for tokens, own in times.items():
                begin = time.perf_counter()
                generate(given, tokens)
                own.append(time.perf_counter() - begin)
        first, whole = statistics.median(times[1]), statistics.median(times[args.tokens])
        rate = rows * (args.tokens - 1) / max(whole - first, whole / 2)  # a run that was disturbed is not faster
        found[rows] = {"first": first, "rate": rate, "tokens": completions[0]}
    print("\n" + json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
