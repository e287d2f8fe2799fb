"""Every sequence architecture over HTTP: tokens are those of full recomputation, whatever the engine saves itself."""

import threading
from itertools import product

import openai
import pytest
import torch
import uvicorn

import models
from models import registry
from serve.drafters.ngram import NGram
from serve.engine import Engine
from serve.http.api import create_app
from serve.http.served import Served, Service
from serve.worker import Worker

KINDS = ("mixer", "pattern", "ffn", "block", "head", "position", "score", "cache")
PROMPTS = [[3, 1, 4, 1, 5] * 5, [3, 1, 4, 1, 5] * 5 + [9, 2, 6, 9, 2, 6], [7]]
TOKENS = 12


def names():
    """All that can go on from a prompt."""
    found = [name for kind in KINDS for name in models.names(kind=kind)]
    return [name for name in found if "serve" in registry.supports(models.build(name))]


@pytest.fixture(scope="module")
def endpoint():
    """A real server, and the models behind it, which each test puts there."""
    behind = {}
    config = uvicorn.Config(create_app(Service(behind)), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client, behind
    server.should_exit = True
    thread.join()


def complete(client, model, prompt):
    """Token ids of a greedy completion, and how many of the prompt's were found in the cache."""
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
    )
    tokens = [int(token.removeprefix("token_id:")) for token in answer.choices[0].logprobs.tokens]
    return tokens, answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("name", names())
def test_it_generates_over_http_what_recomputation_gives(name, endpoint):
    client, behind = endpoint
    torch.manual_seed(0)
    model = models.build(name).eval()
    with torch.no_grad():
        model.head.weight.mul_(6)  # sharp: no two tokens are nearly as likely as each other
    for cache, drafting in product((False, True), repeat=2):
        drafter = NGram(shortest=1, widest=4) if drafting else None
        engine = Engine(model, max_rows=2, max_len=64, page=4, chunk=16, prefix_cache=cache, drafter=drafter)
        if drafting:
            engine.speculation.width.choose = lambda rates, ready: 4
        worker = Worker(engine)
        behind["it"] = Served.local(worker, "it")
        found = []
        for prompt in PROMPTS:
            tokens, cached = complete(client, "it", prompt)
            with torch.inference_mode():
                logits_BTC, _ = model.logits(torch.tensor([prompt + tokens]))
            assert tokens == logits_BTC[0, len(prompt) - 1 : -1].argmax(-1).tolist(), f"{cache=} {drafting=}"
            found.append(cached)
        worker.stop()
        assert (found[1] > 0) == cache and found[0] == found[2] == 0
        assert not drafting or engine.speculation.drafted > 0
