"""A mistake in a command is one line that says what is allowed, in seconds, with exit code 2, before Ray starts."""

import json
import subprocess
import sys
import time

import pytest
from group import ROOT, environment

from jobs import cli
from jobs.config import check, differences, from_json, to_json
from jobs.pretrain import main


def error(capsys, *arguments: str) -> str:
    """The line a command ends with; fails when there is more, or another exit code."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    said = capsys.readouterr()
    assert end.value.code == 2, said.err
    assert said.err.count("\n") == 1 and said.err.startswith("error: "), said.err
    return said.err


MISTAKES = {
    "tinny": "no recipe 'tinny'; recipes: demo, gan_digits, tiny, vit_digits",
    "tiny --stps 3": "unknown option --stps; did you mean --steps",
    "tiny --model.width 3": "--model.dim",
    "tiny --steps many": "steps",
    "tiny --zero 7": "Expected one of ('0', '1', '2', '3')",
    "tiny --engine fast": "'torch', 'deepspeed'",
    "tiny extra": "Unrecognized options: extra",
    "tiny --steps": "Missing value",
    "tiny --steps 0": "steps=0: must be at least 1",
    "tiny --batch 7": "batch=7: must be a multiple of workers * accumulate = 2 * 1 = 2",
    "tiny --batch 8 --accumulate 8": "= 2 * 8 = 16",
    "tiny --zero 2": "add --engine deepspeed",
    "tiny --engine deepspeed --workers 0": "--workers 1 or more",
    "tiny --keep 0": "keep=0",
    "tiny --name ../x": "name='../x'",
    "tiny --optim.lr -1": "optim.lr=-1.0: must be above 0",
    "tiny --optim.beta2 1": "optim.beta2=1.0: must be in [0, 1)",
    "tiny --data.vocab 1024": "--model.vocab 1024",
    "tiny --data.source text": "data.path is empty",
    "tiny --data.source text --data.path /nowhere/at/all": "/nowhere/at/all",
    "tiny --model.pattern gqqa": "did you mean gqa or ",
    "tiny --model.pattern gqa(widow=3)": "gqa has no option 'widow'; its options: ",
    "tiny --model.dim 63": "dim=63",
    "tiny:encoder_decoder": "pairs of a source and a target",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("EDIFICE_HOME", str(tmp_path))
    began = time.monotonic()
    assert MISTAKES[command] in error(capsys, *command.split())
    assert time.monotonic() - began < 20
    assert not list(tmp_path.glob("runs/*/*")), "a refused job must leave nothing behind"


def test_a_process_ends_with_the_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "jobs.pretrain", "tiny", "--batch", "7"]
    variables = environment(EDIFICE_HOME=tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: batch=7: must be a multiple of workers * accumulate = 2 * 1 = 2"


def test_submit_without_a_cluster_says_how_to_start_one(tmp_path):
    command = [sys.executable, "-m", "jobs.submit", "tiny"]
    variables = environment(EDIFICE_HOME=tmp_path, RAY_ADDRESS="http://127.0.0.1:9")
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no Ray cluster answers at http://127.0.0.1:9; start one: RAY_AUTH_MODE=token ray start" in done.stderr
    assert done.stderr.count("\n") == 1


def test_pretrain_says_in_one_line_that_a_named_cluster_is_not_there(tmp_path):
    command = [sys.executable, "-m", "jobs.pretrain", "tiny"]
    variables = environment(EDIFICE_HOME=tmp_path, RAY_ADDRESS="127.0.0.1:9")
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("recipe", cli.recipes())
def test_a_recipe_is_a_complete_job_that_survives_json(recipe):
    job = cli.load(recipe)
    check(job)
    assert from_json(json.loads(json.dumps(to_json(job)))) == job


def test_options_reach_the_job():
    options = ["--model.pattern", "3*gated_deltanet gqa(window=64)", "--optim.lr=3e-3", "--model.tied"]
    options += ["--save-every", "7"]
    job = cli.override(cli.load("tiny"), "x", options)
    assert job.model.pattern == "3*gated_deltanet gqa(window=64)"
    assert (job.optim.lr, job.model.tied, job.save_every) == (3e-3, True, 7)
    assert job.data == cli.load("tiny").data


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["tiny", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in cli.options(cli.load("tiny")))


def test_only_what_changes_the_training_stops_a_run_from_going_on():
    job = cli.load("tiny")
    free = cli.override(job, "x", "--steps 99 --workers 1 --engine deepspeed --zero 3 --keep 9 --eval_every 3".split())
    assert differences(to_json(job), to_json(free)) == []
    other = cli.override(job, "x", "--optim.lr 0.5 --model.dim 64 --seed 9 --data.limit_bytes 5 --batch 4".split())
    named = differences(to_json(job), to_json(other))
    assert [line.partition(":")[0] for line in named] == ["batch", "data.limit_bytes", "model.dim", "optim.lr", "seed"]
