"""One of three processes, run by test_mixers_sparse.py as `python ring_ranks.py RANK FOLDER SEED`.

The first 2, then all 3 of them form a gloo group and run each case; a line a case goes to FOLDER/RANK.jsonl: [ranks,
name, what went wrong or ""]. Outputs and gradients of a rank are held to those of one process that has everything.
"""

import json
import random
import sys
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import models
from kernels.ring import shard
from models.mixers.ring_attention import RingAttention, join
from models.span import Span
from models.stateful import Place

RANKS = 3
CASES = {
    "causal": {},
    "window": {"window": 5},
    "full": {"mask": "full", "balance": "contiguous"},
    "norms": {"qk_norm": True, "out_norm": True, "scale": 0.7},
    "documents": {"documents": True},
    "decoder": {},
}


def close(ours, theirs):
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
    assert error < 1e-5, f"relative error {error:.2e}"


def mixer_case(rank, ranks, group, balance="zigzag", documents=False, **options):
    mixer = RingAttention(RingAttention.Config(4, 2, 8, **options), Place(24))
    tokens = 2 * ranks * random.choice([3, 4])
    x, weight = torch.randn(2, tokens, 24, requires_grad=True), torch.randn(2, tokens, 24)
    at, segments = Span(torch.arange(tokens).expand(2, tokens)), None
    if documents:
        segments = torch.where(torch.rand(2, tokens) < 0.2, -1, (torch.rand(2, tokens) < 0.2).long().cumsum(1))
        weight = weight * (segments >= 0)[..., None]
    leaves = [x, *mixer.parameters()]
    y = mixer(x, replace(at, segments_BT=segments))[0]
    wanted = torch.autograd.grad((y * weight).sum(), leaves)
    join(mixer, group, balance)
    own = lambda part: shard(part, rank, ranks, balance)  # noqa: E731
    if documents:
        raised = False
        try:
            mixer(own(x), Span(own(at.positions_BT), segments_BT=own(segments)))
        except ValueError as error:
            raised = "documents" in str(error)
        assert raised
    local = torch.arange(tokens // ranks).expand(2, -1)  # what a rank by itself takes the positions to be
    shared = {"documents": own(segments)} if documents else {}
    ours = mixer(own(x), Span(local, shared=shared))[0]
    real = own(weight) != 0
    close(ours * real, own(y) * real)
    found = torch.autograd.grad((ours * own(weight)).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        dist.all_reduce(one, group=group)
        close(one, other)
    state = {name: spec.empty(2, tokens) for name, spec in mixer.state_spec(tokens).items()}
    alone, _ = mixer(x, replace(at, segments_BT=segments, length_B=torch.zeros(2).long()), state)
    close(alone * (weight != 0), y * (weight != 0))


def decoder_case(rank, ranks, group):
    decoder = models.build("ring_attention")
    ids = torch.randint(64, (2, 4 * ranks))
    logits, _ = decoder.logits(ids)
    weight = torch.randn_like(logits)
    wanted = torch.autograd.grad((logits * weight).sum(), list(decoder.parameters()))
    join(decoder, group)
    ours, _ = decoder.logits(shard(ids, rank, ranks))
    close(ours, shard(logits, rank, ranks))
    found = torch.autograd.grad((ours * shard(weight, rank, ranks)).sum(), list(decoder.parameters()))
    for one, other in zip(found, wanted, strict=True):
        dist.all_reduce(one, group=group)
        close(one, other)
    join(decoder, None)
    close(decoder.logits(ids)[0], logits)


def main(rank, folder, seed):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    groups = {ranks: dist.new_group(range(ranks)) for ranks in range(2, RANKS + 1)}
    with open(folder / f"{rank}.jsonl", "w") as results:
        for ranks, group in groups.items():
            for name, options in CASES.items():
                if rank >= ranks:
                    continue
                torch.manual_seed(seed)
                random.seed(seed)
                error = ""
                try:
                    run = decoder_case if name == "decoder" else mixer_case
                    run(rank, ranks, group, **options)
                except Exception:
                    error = traceback.format_exc()
                print(json.dumps([ranks, name, error]), file=results, flush=True)
                if error:  # the others may be anywhere
                    sys.exit(1)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
