"""A process of its own with vLLM's engine: tells in a line of JSON what it says to some requests, then serves HTTP.

python tests/serve/vllm_server.py RUN PORT
"""

import json
import sys
from dataclasses import asdict

import uvicorn

from serve import vllm
from serve.http.api import create_app
from serve.http.served import Served, Service
from serve.request import Request
from serve.sampler import Sampling
from serve.template import Template
from serve.worker import Worker


def told(engine, **options) -> list[dict]:
    """The events of one request."""
    engine.submit(Request(**options))
    events = []
    while engine.busy:
        events += [{**asdict(event), "error": None} for event in engine.step()]
    return events


def main(path: str, port: int) -> None:
    # Eager: compiling takes longer than all the tests.
    engine = vllm.load(path, max_rows=4, max_len=256, enforce_eager=True)
    greedy, prompt = Sampling(max_tokens=24, temperature=0), [1, 2, 3, 4, 5]
    whole = told(engine, prompt=prompt, sampling=greedy)
    first = [event["token"] for event in whole[:7]]
    found = {
        "whole": whole,
        "resumed": told(engine, prompt=prompt, sampling=greedy, resumed=first),
        "deadline": told(engine, prompt=prompt, sampling=Sampling(max_tokens=200, ignore_eos=True), deadline=0.0),
        "bias": told(engine, prompt=prompt, sampling=Sampling(max_tokens=2, logit_bias=((7, 100.0),))),
        "texts": [result.text for result in engine.generate(["def f", "for"], greedy)],
    }
    print(json.dumps(found), flush=True)
    served = Served.local(Worker(engine, waiting=4), "tiny", Template(engine.tokenizer))
    uvicorn.run(create_app(Service.of(served)), port=port, log_level="error")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
