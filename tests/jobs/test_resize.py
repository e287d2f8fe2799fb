"""One run at changing sizes and ZeRO stages, and activations that are computed again: the curve stays what it was."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from group import ROOT, run_ranks
from test_pretrain import curve

from cluster import folder
from jobs.config import from_json
from jobs.data import index_of, prepare

KINDS = ("torch", "0", "1", "2", "3")
TOLERANCE = 1e-4  # relative, of an fp32 loss: sums over other numbers of ranks and micro-batches round differently

# A constant rate, so that a run of 6 steps made longer is the beginning of one of 18.
RECIPE = "tiny --steps 18 --optim.schedule constant --eval_every 6 --save_every 0 --name".split()
SIZES = {
    6: "--workers 2 --engine deepspeed --zero 2 --accumulate 2",
    12: "--workers 1 --engine deepspeed --zero 0",
    18: "--workers 2 --engine deepspeed --zero 3 --checkpointing block",
}


def pretrain(cluster, name: str, *options: str) -> str:
    command = [sys.executable, "-m", "jobs.pretrain", *RECIPE, name, *options]
    done = subprocess.run(command, env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(cluster):
    """(unbroken in one process, resized twice), and what the manifest said after each part of the second."""
    pretrain(cluster, "unbroken", "--workers", "0")
    manifests = []
    for steps, size in SIZES.items():
        output = pretrain(cluster, "resized", "--steps", str(steps), *size.split())
        assert steps == 6 or f"going on at step {steps - 6}" in output
        manifests.append(
            folder.read_manifest(str(run_of(cluster, "resized") / f"checkpoints/step-{steps:08d}"))["meta"]
        )
    return run_of(cluster, "unbroken"), run_of(cluster, "resized"), manifests


def run_of(cluster, name: str) -> Path:
    return cluster.home / "runs" / name


def test_a_run_goes_on_at_another_size_and_stage_on_the_same_curve(runs):
    unbroken, resized, manifests = runs
    assert [meta["world"] for meta in manifests] == [2, 1, 2]
    ours, theirs = curve(resized), curve(unbroken)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in {"loss", "val_loss", "grad_norm"} & mine.keys():
            assert math.isclose(mine[name], other[name], rel_tol=TOLERANCE), (mine["step"], name)
    losses = [record["loss"] for record in theirs if "loss" in record]
    assert losses[-1] < losses[0] - 0.3, "a curve that stands still would prove nothing"


def test_every_sample_is_read_exactly_once(runs, cluster, monkeypatch):
    """A step's record tells how many targets stand for how many bytes: a print of the rows that were really read."""
    _, resized, manifests = runs
    monkeypatch.setenv("EDIFICE_HOME", str(cluster.home))
    job = from_json(manifests[-1]["job"])
    assert [meta["samples"] for meta in manifests] == [steps * job.batch for steps in SIZES]
    from jobs.data import tokenizer

    prepared = prepare(job.data)
    bytes_C = tokenizer.token_bytes(tokenizer.load(prepared.tokenizer))
    index = index_of(prepared, "train", job.length, job.seed)
    records = [record for record in curve(resized) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 19))
    prints = []
    for record in records:
        targets_BT = index.rows((record["step"] - 1) * job.batch, job.batch)["targets_BT"]
        real_N = targets_BT[targets_BT >= 0]
        prints.append(len(real_N) / int(bytes_C[real_N].sum()))
        assert math.isclose(record["bits_per_byte"] * math.log(2) / record["loss"], prints[-1], rel_tol=1e-9)
    assert len(set(prints)) == len(prints), "two steps look alike, so one read twice would not be seen"


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory):
    out = tmp_path_factory.mktemp("recompute") / "results.json"
    run_ranks("recompute_ranks.py", 2, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_computing_blocks_again_changes_no_bit_and_takes_less_memory(recomputed, kind):
    kept, again = recomputed[f"{kind} none"], recomputed[f"{kind} block"]
    assert again["curve"] == kept["curve"] and again["loss"] == kept["loss"]
    assert again["bytes"] < kept["bytes"] / 8, (again["bytes"], kept["bytes"])


def test_blocks_above_frozen_ones_still_learn():
    import models

    decoder = models.build("decoder", layers=2, dim=32)
    decoder.embedding.weight.requires_grad_(False)
    gradients = []
    for decoder.blocks.recompute in (False, True):
        decoder.zero_grad()
        decoder(decoder.example(2))[0].backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_checkpointing_is_for_decoders():
    from dataclasses import replace

    from jobs import cli
    from jobs.config import check

    job = cli.load("vit_digits")
    with pytest.raises(ValueError, match="only decoders have blocks"):
        check(replace(job, checkpointing="block"))
