"""Every sequence architecture: its tiny recipe learns, and what it has learnt is served as it would be recomputed."""

import dataclasses
import time

import pytest
import torch

import models
from jobs import cli
from jobs.pretrain import pretrain, run_folder
from models import hub
from serve.engine import Engine
from serve.request import Request
from serve.sampler import Sampling

ROWS = [name for kind in ("mixer", "pattern") for name in models.names(kind=kind)]
PARTS = [name for kind in ("ffn", "block", "head", "position", "score", "cache") for name in models.names(kind=kind)]


pytestmark = pytest.mark.usefixtures("home")


def trained(name, **changes):
    job = dataclasses.replace(cli.load(f"tiny:{name}"), workers=0, threads=1, save_every=0, **changes)
    return job, pretrain(job)


@pytest.mark.parametrize("name", [name for name in ROWS + PARTS if not models.build(name).needs_memory])
def test_it_learns_and_is_served(name):
    began = time.perf_counter()
    job, summary = trained(name)
    assert summary.last < 0.93 * summary.first, f"bits per byte {summary.first} -> {summary.last}"
    print(f"{name}: {time.perf_counter() - began:.1f} s, {summary.first:.3f} -> {summary.last:.3f}")
    model = hub.load(str(run_folder(job.name)))
    if not model.causal:
        with pytest.raises(ValueError, match="not a causal decoder"):
            Engine(model, max_rows=2, max_len=64)
        return
    engine = Engine(model, max_rows=2, max_len=64, chunk=7, page=4)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(512, (length,), generator=generator).tolist() for length in (1, 9, 24)]
    tokens = {}
    ids = [
        engine.submit(Request(prompt, Sampling(max_tokens=20, temperature=0.0, ignore_eos=True))) for prompt in prompts
    ]
    while engine.busy:
        for event in engine.step():
            tokens.setdefault(event.id, []).append(event.token)
    for prompt, id in zip(prompts, ids):
        with torch.inference_mode():
            logits, _ = model.logits(torch.tensor([prompt + tokens[id]]))
        assert tokens[id] == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
