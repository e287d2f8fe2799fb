"""vLLM in the place of our engine, for checkpoints that it knows: the same requests and events, so `serve.worker` and
all that is built on it work with either.

What vLLM can't do, or would do otherwise, is refused: grammars and embeddings; speculation is ours alone. Random
numbers are vLLM's: a seed gives the same completion again, but not ours, and a sampled completion that moves to another
replica goes on with new ones (a greedy one goes on as it would have). Fairness among keys is not known to vLLM. Texts,
stop texts and end tokens are ours. vLLM is imported when a model is loaded, never before.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from tokenizers import Tokenizer

from serve.engine import END, EOS, Engine
from serve.grammar import Grammars
from serve.prompts import Prompts
from serve.request import Event, Request
from serve.sampler import Logprobs, Sampling
from serve.text import TextStream

SETTINGS = {  # of vLLM's process, unless the user has others
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several replicas share a machine, and torch's threads were chosen
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Refusing(Prompts):
    """Also refuses what vLLM can't do."""

    def check(self, request: Request) -> None:
        super().check(request)
        sampling = request.sampling
        if request.embed:
            raise ValueError("input: engine=vllm makes no embeddings; serve the model with engine=edifice")
        if len(request.prompt) == self.max_len:
            raise ValueError("prompt: engine=vllm needs room for one token more")
        if sampling.grammar:
            raise ValueError("response_format: engine=vllm follows no grammars; serve the model with engine=edifice")
        if request.resumed and (sampling.frequency_penalty or sampling.presence_penalty):
            raise ValueError("resumed: engine=vllm cannot go on with penalties, as it would count from the beginning")


@dataclass(slots=True)
class Running:
    """A request that vLLM works on. name: vLLM's own of it."""

    id: int
    name: str
    request: Request
    text: TextStream | None
    told: int = 0  # tokens
    cached: int = 0


class VLLMEngine:
    """One vLLM engine in this process, to be used from one thread like `serve.engine.Engine`.

    path: a Hugging Face folder. tokenizer, max_rows, max_len, memory_bytes, chunk: as of Engine. ends: ids of end
    tokens. options: further ones of vLLM's EngineArgs.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int = 32,
        max_len: int = 2048,
        memory_bytes: int | None = None,
        chunk: int = 2048,
        ends: Sequence[int] = (),
        **options: Any,
    ) -> None:
        config = json.loads((Path(path) / "config.json").read_text())
        self.tokenizer, self.max_rows = tokenizer, max_rows
        known = [] if tokenizer is None else [tokenizer.token_to_id(end) for end in (EOS, END)]
        self.ends = sorted({*(token for token in known if token is not None), *ends})
        self.prompts = Refusing(tokenizer, config["vocab_size"], max_len)
        self.grammars = Grammars(tokenizer, config["vocab_size"], self.ends)  # what is wrong with one is told first
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker's thread is what takes its steps
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise ValueError(
                f"engine=vllm: vLLM is not installed ({error}); `make` of this project installs it"
            ) from None
        memory = memory_bytes or _memory(config, max_rows * max_len)
        self._vllm = LLMEngine.from_engine_args(
            EngineArgs(
                model=path,
                skip_tokenizer_init=True,
                dtype=_dtype(config),  # its own choice would halve float32
                max_model_len=max_len,
                max_num_seqs=max_rows,
                max_num_batched_tokens=max(chunk, max_rows),
                enable_chunked_prefill=True,
                kv_cache_memory_bytes=memory,
                scheduling_policy="priority",
                disable_log_stats=True,
                **options,
            )
        )
        self._scheduler = self._vllm.engine_core.engine_core.scheduler
        self._ids = count()
        self._live: dict[int, Running] = {}
        self._names: dict[str, Running] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._pending: list[Event] = []
        self._steps = self._generated = self._queries = self._hits = 0

    generate = Engine.generate  # it needs no more of an engine than there is here

    def warm(self) -> None:
        """Do now what is slow once."""
        self.generate([[0, 0]], Sampling(max_tokens=2))

    @property
    def busy(self) -> bool:
        return bool(self._live or self._pending)

    def submit(self, request: Request) -> int:
        """As Engine's. ValueError too for what vLLM can't do."""
        self.prompts.check(request)
        text = None if self.tokenizer is None else TextStream(self.tokenizer, request.sampling.stop)
        for token in request.resumed if text else ():
            text.push(token)
        id = next(self._ids)
        prompt = {"prompt_token_ids": [*request.prompt, *request.resumed]}
        name = self._vllm.add_request(str(id), prompt, self._params(request), priority=request.priority)
        self._live[id] = self._names[str(id)] = Running(id, name, request, text, len(request.resumed))
        if request.deadline is not None:
            heappush(self._deadlines, (monotonic() + request.deadline, id))
        return id

    def cancel(self, id: int) -> None:
        self._stop(id, "cancelled")

    def step(self) -> list[Event]:
        while self._deadlines and self._deadlines[0][0] <= monotonic():
            self._stop(heappop(self._deadlines)[1], "deadline")
        events, self._pending = self._pending, []
        if not self._vllm.has_unfinished_requests():
            return events
        self._steps += 1
        for output in self._vllm.step():
            running = self._names.get(output.request_id)
            if running is not None:
                events += self._events(running, output)
        return events

    def stats(self) -> dict[str, float]:
        """As Engine's, as far as vLLM tells; blocks are pages."""
        running, waiting = self._scheduler.get_request_counts()
        pool = self._scheduler.kv_cache_manager.block_pool
        return {
            "running": running,
            "waiting": waiting,
            "rows": self.max_rows,
            "pages_used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "pages_total": pool.num_gpu_blocks - 1,  # one is vLLM's own
            "prefix_queries": self._queries,
            "prefix_hits": self._hits,
            "evictions": 0,
            "preemptions": 0,
            "drafted": 0,
            "accepted": 0,
            "steps": self._steps,
            "generated": self._generated,
        }

    # ----------------------------------------------------------------------------------------------------------------

    def _params(self, request: Request) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling, done = request.sampling, len(request.resumed)
        ends = () if sampling.ignore_eos else self.ends
        seed = None if sampling.seed is None else (sampling.seed + done) % 2**63
        return SamplingParams(
            max_tokens=max(1, sampling.max_tokens - done),  # with 0 the one token is not told
            min_tokens=max(0, sampling.min_tokens - done),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias={token: value for token, value in sampling.logit_bias} or None,
            stop_token_ids=sorted({*ends, *sampling.stop_token_ids}),
            ignore_eos=True,  # the ends above are all there are
            logprobs=sampling.logprobs,
            prompt_logprobs=None if done else sampling.prompt_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _events(self, running: Running, output: Any) -> list[Event]:
        """One per token; a stop text may end the completion before vLLM does."""
        [completion] = output.outputs
        if running.told == len(running.request.resumed):
            running.cached = output.num_cached_tokens or 0
            self._queries += len(running.request.prompt) + len(running.request.resumed)
            self._hits += running.cached
        prompt = None
        if output.prompt_logprobs:
            pairs = zip(output.prompt_logprobs[1:], running.request.prompt[1:])
            prompt = [_logprobs(table, token, running.request.sampling.prompt_logprobs) for table, token in pairs]
        if not running.request.sampling.max_tokens:
            self._forget(running, aborted=False)
            return [Event(running.id, None, "", "length", cached=running.cached, prompt_logprobs=prompt)]
        events, last = [], len(completion.token_ids) - 1
        for place, token in enumerate(completion.token_ids):
            running.told += 1
            self._generated += 1
            sampling, text, stopped = running.request.sampling, "", False
            offset = 0 if running.text is None else running.text.length
            ends = place == last and completion.finish_reason == "stop"
            if running.text is not None and not ends:
                text = running.text.push(token)
                stopped = running.text.stopped
            reason = completion.finish_reason if place == last else None
            reason = "stop" if stopped else reason
            tables = completion.logprobs
            told = None if tables is None else _logprobs(tables[place], token, sampling.logprobs)
            if reason is not None and running.text is not None:
                text += running.text.close()
            first = {"cached": running.cached, "prompt_logprobs": prompt}
            events.append(Event(running.id, token, text, reason, told, offset, **first))
            running.cached, prompt = 0, None  # they are told once
            if reason is not None:
                self._forget(running, aborted=stopped)
                break
        return events

    def _stop(self, id: int, reason: str) -> None:
        running = self._live.get(id)
        if running is not None:
            self._forget(running, aborted=True)
            self._pending.append(Event(id, None, "", reason, cached=running.cached))

    def _forget(self, running: Running, aborted: bool) -> None:
        if aborted:
            self._vllm.abort_request([running.name], internal=True)
        del self._live[running.id], self._names[str(running.id)]


def load(path: str, **options: Any) -> VLLMEngine:
    """Of a Hugging Face folder, or of a run or model folder of ours whose model can be written as one.

    ValueError in one line when vLLM has nothing like it.
    """
    from cluster import folder
    from models import hub
    from serve.stored import is_plain
    from serve.template import CONFIG, spelling

    if is_plain(path):
        return _open(path, Path(path) / "tokenizer.json", _ends(Path(path)), options)
    place = hub.locate(path)
    stored, ends = folder.load(place), []
    with TemporaryDirectory(prefix="edifice-vllm-") as written:
        hub.save_hf(hub.load(place), written)
        for name in ("tokenizer.json", CONFIG):
            if name in stored:
                (Path(written) / name).write_bytes(stored.bytes(name))
        if CONFIG in stored and "tokenizer.json" in stored:
            end = Tokenizer.from_str(stored.text("tokenizer.json")).token_to_id(
                spelling(stored.json(CONFIG).get("eos_token"))
            )
            ends = [] if end is None else [end]
        return _open(written, Path(written) / "tokenizer.json", ends, options)


def _open(path: str, tokenizer: Path, ends: Sequence[int], options: dict[str, Any]) -> VLLMEngine:
    return VLLMEngine(path, Tokenizer.from_file(str(tokenizer)) if tokenizer.is_file() else None, ends=ends, **options)


def _ends(path: Path) -> list[int]:
    """End tokens that a Hugging Face folder names."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            end = json.loads((path / name).read_text()).get("eos_token_id")
            found += [end] if isinstance(end, int) else end or []
    return found


def _dtype(config: dict[str, Any]) -> str:
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def _memory(config: dict[str, Any], tokens: int) -> int:
    """Bytes of keys and values of `tokens` tokens, and a block for each of a few rows that is not full."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    size = 4 if _dtype(config) == "float32" else 2
    each = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width * size
    return each * (tokens + 4096)


def _logprobs(table: dict[int, Any], token: int, count: int) -> Logprobs:
    likeliest = sorted((entry.rank, id, entry.logprob) for id, entry in table.items() if entry.rank <= count)
    return Logprobs(table[token].logprob, tuple((id, value) for _, id, value in likeliest))
