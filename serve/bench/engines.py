"""Engines that decode the same checkpoint, each run alone in a process of its own: `python -m serve.bench.engines`.

One JSON line comes out, by the number of requests: the tokens of a first run, which warms up, and of each further one
what `serve.bench.arrivals` tells. Every run has new prompts, all asked at once, greedy.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from serve.bench import checkpoint
from serve.bench.arrivals import Round

Tell = Callable[[int, int], None]  # the row of a request and its next token
Generate = Callable[[list[list[int]], int, Tell], None]  # prompts, new tokens of each, who is told
LENGTH = 512


def edifice(folder: Path, form: str, threads: int, simple: bool) -> Generate:
    from serve.load import load
    from serve.request import Request
    from serve.sampler import Sampling

    dtype = form if form in ("fp32", "bf16") else "bf16"
    engine = load(str(folder / "edifice"), dtype=dtype, weights=form, max_len=LENGTH)
    engine.warm()

    def generate(prompts: list[list[int]], tokens: int, tell: Tell) -> None:
        sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        rows = {engine.submit(Request(prompt, sampling)): row for row, prompt in enumerate(prompts)}
        while engine.busy:
            for event in engine.step():
                tell(rows[event.id], event.token)

    return generate


def transformers(folder: Path, form: str, threads: int, simple: bool) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[form]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype).eval()

    class Telling(BaseStreamer):
        def __init__(self, tell: Tell) -> None:
            self.tell = tell

        def put(self, ids) -> None:
            if ids.ndim == 1:  # the prompts come first, as a matrix
                for row, token in enumerate(ids.tolist()):
                    self.tell(row, token)

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], tokens: int, tell: Tell) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0, streamer=Telling(tell),
            )  # fmt: skip

    return generate


def vllm(folder: Path, form: str, threads: int, simple: bool) -> Generate:
    import itertools

    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        str(folder / "hf"), dtype={"fp32": "float32", "bf16": "bfloat16"}[form], skip_tokenizer_init=True,
        max_model_len=LENGTH, max_num_seqs=32, kv_cache_memory_bytes=2**30, disable_log_stats=True,
        enforce_eager=simple,
    )  # fmt: skip
    engine, names = llm.llm_engine, itertools.count()

    def generate(prompts: list[list[int]], tokens: int, tell: Tell) -> None:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        rows = {}
        for row, prompt in enumerate(prompts):
            name = str(next(names))
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
            rows[name] = row
        while engine.has_unfinished_requests():
            for output in engine.step():
                for token in output.outputs[0].token_ids:
                    tell(rows[output.request_id], token)

    return generate


def llama_cpp(folder: Path, form: str, threads: int, simple: bool) -> Generate:
    from llama_cpp import Llama, llama_cpp

    if simple:
        default = llama_cpp.llama_model_default_params

        def plain():
            params = default()
            params.use_extra_bufts = False
            return params

        llama_cpp.llama_model_default_params = plain
    path = str(folder / f"{form}.gguf")
    llama = Llama(path, n_ctx=LENGTH, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompts: list[list[int]], tokens: int, tell: Tell) -> None:
        for row, prompt in enumerate(prompts):
            for count, token in enumerate(llama.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True), 1):
                tell(row, int(token))
                if count == tokens:
                    break

    return generate


ENGINES = {"edifice": edifice, "transformers": transformers, "vllm": vllm, "llama_cpp": llama_cpp}
ALONE = {"llama_cpp"}  # answer one request at a time


def measured(generate: Generate, prompts: list[list[int]], tokens: int) -> tuple[Round, list[list[int]]]:
    """One run, and what was said in it."""
    said: list[list[int]] = [[] for _ in prompts]
    times: list[list[tuple[float, int]]] = [[] for _ in prompts]
    begin = time.perf_counter()

    def tell(row: int, token: int) -> None:
        said[row].append(token)
        times[row].append((time.perf_counter() - begin, len(said[row])))

    generate(prompts, tokens, tell)
    return Round.of(times), said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.bench.engines", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("form", choices=("fp32", "bf16", "int8", "int4"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--simple", action="store_true", help="vLLM does not compile, llama.cpp does not repack")
    args = parser.parse_args()
    if args.name != "llama_cpp":  # its Python may have nothing but it
        import torch

        torch.set_num_threads(args.threads)
    vocab = checkpoint.vocabulary(args.folder)
    generate = ENGINES[args.name](args.folder, args.form, args.threads, args.simple)
    found = {}
    for rows in [1] if args.name in ALONE else args.rows:
        _, said = measured(generate, checkpoint.prompts(rows, args.prompt, vocab, 0), args.tokens)
        runs = [
            measured(generate, checkpoint.prompts(rows, args.prompt, vocab, draw), args.tokens)[0].json()
            for draw in range(1, args.rounds + 1)
        ]
        found[rows] = {"tokens": said, "rounds": runs}
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
