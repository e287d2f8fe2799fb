"""Jobs on a real Ray cluster: submitted, killed, asked to stop, gone on with, and still the same curve bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from group import ROOT, wait

# Small, but through everything: two workers, DeepSpeed, micro-batches, checkpoints every few steps.
RECIPE = ["tiny", "--engine", "deepspeed", "--zero", "2", "--accumulate", "2", "--steps", "30", "--eval_every", "10"]


def curve(run: Path) -> list[dict]:
    """What must not depend on how often a run was interrupted."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_s")} for record in records]


def steps_made(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len([line for line in path.read_text().splitlines() if '"loss"' in line]) if path.exists() else 0


def has_checkpoint(run: Path) -> bool:
    return any(run.glob("checkpoints/*/manifest.json"))


def start(cluster, name: str, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs.pretrain", *RECIPE, "--name", name, *options]
    log = (cluster.home / f"{name}.log").open("a")
    return subprocess.Popen(command, env=cluster.environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(cluster, process: subprocess.Popen, name: str) -> str:
    code = process.wait(timeout=180)
    output = (cluster.home / f"{name}.log").read_text()
    assert code == 0, output[-4000:]
    return output


def submit(cluster, *arguments: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.dashboard]
    command += ["--working-dir", ".", "--", "python", "-m", "jobs.pretrain", *arguments]
    environment = {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def whole(cluster):
    """(output, run) of an unbroken run, submitted as a job."""
    done = submit(cluster, *RECIPE, "--name", "whole")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout, cluster.home / "runs" / "whole"


def test_a_submitted_job_shows_progress_and_leaves_a_run(whole):
    output, run = whole
    assert re.search(r"step 30/30  loss \d", output), output[-3000:]
    final = re.search(r"run whole: 30/30 steps, validation bits/byte ([\d.]+) -> ([\d.]+), (.+)", output)
    assert final, output[-3000:]
    assert float(final[2]) < float(final[1])
    assert Path(final[3].strip()) == run
    steps = [record["step"] for record in curve(run) if "loss" in record]
    assert steps == list(range(1, 31))
    assert [record["step"] for record in curve(run) if "val_loss" in record] == [0, 10, 20, 30]
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run / "tensorboard").glob("events.*"))
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["step-00000025", "step-00000030"]
    files = {path.name for path in (run / "checkpoints" / "step-00000030").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors", "optimizer.safetensors", "manifest.json"} <= files
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_a_wrong_value_fails_the_submitted_job_in_one_line(cluster):
    done = submit(cluster, "tiny", "--batch", "7")
    assert done.returncode != 0
    assert "error: batch=7: must be a multiple of workers * accumulate = 2 * 1 = 2" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_killed_worker_is_replaced_and_the_curve_is_the_same(cluster, whole):
    run = cluster.home / "runs" / "worker"
    process = start(cluster, "worker")
    wait(lambda: (has_checkpoint(run) and steps_made(run) >= 7) or process.poll() is not None, 120, "step 7")
    pid = re.search(r"pid=(\d+)\) world_rank=1", (cluster.home / "worker.log").read_text())
    os.kill(int(pid[1]), signal.SIGKILL)
    output = finish(cluster, process, "worker")
    assert "going on at step" in output
    assert curve(run) == curve(whole[1])


def test_submit_is_ray_job_submit(cluster, whole):
    command = [sys.executable, "-m", "jobs.submit", *RECIPE, "--name", "whole"]
    variables = cluster.environment | {"RAY_ADDRESS": cluster.dashboard}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "run whole already has 30 steps" in done.stdout


def test_a_driver_asked_to_stop_and_then_killed_goes_on_when_run_again_and_the_curve_is_the_same(cluster, whole):
    run, log = cluster.home / "runs" / "driver", cluster.home / "driver.log"
    process = start(cluster, "driver")
    wait(lambda: steps_made(run) >= 2 or process.poll() is not None, 120, "step 2")
    process.send_signal(signal.SIGTERM)  # the workers save and end
    assert process.wait(timeout=120) == 143, log.read_text()[-3000:]
    assert "stopped as asked" in log.read_text() and has_checkpoint(run)
    reached = steps_made(run)
    assert reached < 30, "the run ended before it could be stopped"

    process = start(cluster, "driver")
    wait(lambda: steps_made(run) >= reached + 2 or process.poll() is not None, 120, "two more steps")
    process.kill()
    assert process.wait() == -signal.SIGKILL

    output = finish(cluster, start(cluster, "driver"), "driver")
    assert output.count("going on at step") >= 1
    assert curve(run) == curve(whole[1])


def test_a_mistake_only_workers_can_see_is_one_line_and_not_tried_again(cluster):
    name = "diverges"
    process = start(cluster, name, *"--optim.lr 1e30 --optim.clip 0 --optim.warmup 0 --eval_every 0".split())
    assert process.wait(timeout=180) == 2
    output = (cluster.home / f"{name}.log").read_text()
    last = output.strip().splitlines()[-1]
    assert re.match(r"error: step \d+: loss .* is no number; lower --optim.lr", last), last
