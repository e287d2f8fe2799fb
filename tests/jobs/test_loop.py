"""The loop without Ray, in processes that are really killed: exact resume, SIGTERM, refusals, what checkpoints hold."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from group import ROOT, environment, wait
from safetensors.torch import load_file
from test_pretrain import curve, has_checkpoint, steps_made

from cluster import folder

RECIPE = ["tiny", "--workers", "0", "--steps", "24", "--eval_every", "8", "--save_every", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def start(home: Path, name: str, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs.pretrain", *RECIPE, "--name", name, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(EDIFICE_HOME=home), cwd=ROOT, **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output[-3000:]
    return output


@pytest.fixture(scope="module")
def whole(home):
    finish(start(home, "whole"))
    return home / "runs" / "whole"


def reach(process: subprocess.Popen, run: Path, step: int) -> None:
    wait(lambda: (has_checkpoint(run) and steps_made(run) >= step) or process.poll() is not None, 60, f"step {step}")


def test_kills_at_any_moment_leave_the_curve_as_it_was(home, whole):
    run = home / "runs" / "killed"
    for step in (5, 12, 19):
        process = start(home, "killed")
        reach(process, run, step)
        process.kill()
        process.communicate()
    output = finish(start(home, "killed"))
    assert "24/24 steps" in output
    assert curve(run) == curve(whole)
    for name in ("model", "optimizer"):
        ours = load_file(run / f"checkpoints/step-00000024/{name}.safetensors")
        truth = load_file(whole / f"checkpoints/step-00000024/{name}.safetensors")
        assert ours.keys() == truth.keys() and all(torch.equal(ours[key], truth[key]) for key in truth)


def test_sigterm_saves_and_the_same_command_goes_on(home, whole):
    run = home / "runs" / "asked"
    process = start(home, "asked", "--save_every", "0")
    wait(lambda: steps_made(run) >= 3 or process.poll() is not None, 60, "step 3")
    process.send_signal(signal.SIGTERM)
    output = finish(process, 143)
    assert "stopped as asked" in output and has_checkpoint(run)
    output = finish(start(home, "asked", "--save_every", "0"))
    assert "going on at step" in output
    assert curve(run) == curve(whole)


def test_a_run_refuses_another_job_and_names_the_fields(home, whole):
    output = finish(start(home, "whole", "--optim.lr", "0.5", "--model.dim", "64"), 2)
    assert "model.dim: 32 -> 64; optim.lr: 0.01 -> 0.5" in output
    assert output.count("\n") == 1


def test_a_finished_run_is_left_alone_and_can_be_made_longer(home, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    assert "already has 24 steps" in finish(start(home, "whole"))
    assert (whole / "metrics.jsonl").read_bytes() == before
    finish(start(home, "longer", "--steps", "8"))
    finish(start(home, "longer", "--steps", "12"))
    steps = [record["step"] for record in curve(home / "runs" / "longer") if "loss" in record]
    assert steps == list(range(1, 13))


def test_two_processes_do_not_train_one_run(home):
    run = home / "runs" / "twice"
    first = start(home, "twice", "--steps", "2000")
    wait(lambda: steps_made(run) >= 1 or first.poll() is not None, 60, "step 1")
    assert "is being trained by another process" in finish(start(home, "twice", "--steps", "2000"), 2)
    first.kill()
    first.communicate()


def test_a_damaged_checkpoint_is_refused_by_name(home, whole):
    finish(start(home, "damaged", "--steps", "8"))
    file = home / "runs" / "damaged" / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    output = finish(start(home, "damaged", "--steps", "12"), 2)
    assert str(file) in output.splitlines()[-1] and "damaged" in output.splitlines()[-1]


def test_a_torn_checkpoint_is_passed_over(home, whole):
    finish(start(home, "torn", "--steps", "8"))
    newest = home / "runs" / "torn" / "checkpoints" / "step-00000008"
    os.remove(newest / folder.MANIFEST)
    assert "going on at step 4" in finish(start(home, "torn", "--steps", "8"))
    assert folder.complete(str(newest))


def test_a_checkpoint_is_a_model_folder_with_what_resuming_needs(whole):
    from jobs.data import tokenizer
    from models import hub

    place = whole / "checkpoints" / "step-00000024"
    model = hub.load(str(place))
    weights = load_file(place / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert tokenizer.size(tokenizer.load(str(place / "tokenizer.json"))) == model.config.vocab
    meta = folder.read_manifest(str(place))["meta"]
    assert (meta["step"], meta["samples"], meta["updates"], meta["world"]) == (24, 24 * 8, 24, 1)
    assert meta["job"] == json.loads((whole / "config.json").read_text()) | {"steps": 24}
    moments = load_file(place / "optimizer.safetensors")
    assert {f"{name}.{moment}" for name in weights for moment in ("exp_avg", "exp_avg_sq")} == moments.keys()
    assert load_file(place / "random.safetensors")["cpu"].shape[0] == 1


def test_training_learns(whole):
    values = [record["val_bits_per_byte"] for record in curve(whole) if "val_loss" in record]
    assert values[-1] < 0.9 * values[0]
