"""Pretraining: `python -m jobs.pretrain RECIPE [--model.dim 512 ...]`, as it is or after `ray job submit ... --`.

All that can be wrong with a command is checked before Ray starts. The run's folder is EDIFICE_HOME/runs/NAME; the same
command again goes on from its newest checkpoint.
"""

import fcntl
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import session, storage
from jobs import cli, given, report
from jobs.config import Job, check, differences, from_json, to_json
from jobs.data import Prepared, prepare
from jobs.loop import Summary, summary, train
from jobs.worker import STOP, run_group, write_config


def run_folder(name: str) -> Path:
    """Folder of the run called `name`. ValueError when EDIFICE_HOME is not on a (shared) disk."""
    place = storage.local_path(storage.home())
    if place is None:
        raise ValueError(f"EDIFICE_HOME={storage.home()}: runs need a disk, one that all workers share; use a path")
    return place / "runs" / name


def pretrain(job: Job) -> Summary:
    """Trains the job to its end, or goes on where its run stands. ValueError, one line, for what a user can mend."""
    check(job)
    run = run_folder(job.name)
    stored = run / "config.json"
    if stored.exists():
        differ = differences(to_json(from_json(json.loads(stored.read_text()))), to_json(job))
        if differ:
            raise ValueError(
                f"run {job.name} at {run} was started with another job ({'; '.join(differ)}); "
                "give those options as they were, or start a new run with --name"
            )
    prepared = prepare(job.data)
    if prepared.tokenizer and job.model.vocab < prepared.vocab:
        raise ValueError(
            f"model.vocab={job.model.vocab}: the tokenizer has {prepared.vocab} classes; "
            f"set --model.vocab {prepared.vocab}"
        )
    if job.start and not stored.exists():
        given.check(job, prepared)
    with _lock(run, job.name):
        state = summary(run, job)
        if state.finished:
            print(f"run {job.name} already has {state.step} steps; more: --steps, a new run: --name", flush=True)
            return state
        write_config(run, job)
        if job.workers:
            _with_ray(job, run)
        else:
            _in_process(job, prepared, run)
        state = summary(run, job)
        if state.finished:
            report.after(run)
    return state


def _with_ray(job: Job, run: Path) -> None:
    try:
        session.connect(cpus=job.workers)
    except RuntimeError as error:
        raise ValueError(str(error)) from None

    def ask(*_) -> None:
        (run / STOP).touch()

    with _on_sigterm(ask):
        run_group(job, run)


def _in_process(job: Job, prepared: Prepared, run: Path) -> None:
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    if job.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: this machine has no GPU that torch can use; set --device cpu")
    use_gpu = job.device != "cpu" and torch.cuda.is_available()
    asked = threading.Event()
    with _on_sigterm(lambda *_: asked.set()):
        train(job, prepared, run, "cuda" if use_gpu else "cpu", asked.is_set, lambda line: print(line, flush=True))


@contextmanager
def _on_sigterm(handler) -> Iterator[None]:
    """Within: SIGTERM asks the loop to save and end after the step it is in."""
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _lock(run: Path, name: str) -> Iterator[None]:
    """One driver per run; the lock goes with the process, however it ends."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"run {name} at {run} is being trained by another process; wait, or use --name") from None
        yield


def main(arguments: list[str]) -> None:
    finish(cli.parse("jobs.pretrain", arguments))


def finish(job: Job) -> None:
    """Trains the job, prints how it stands, and ends the program as its outcome says."""
    try:
        state = pretrain(job)
    except ValueError as error:
        cli.fail(error)
    except RuntimeError as error:
        cli.fail(error, code=1)
    print(
        f"run {job.name}: {state.step}/{state.steps} steps, "
        f"validation {state.measure} {state.first:.4f} -> {state.last:.4f}, {run_folder(job.name)}",
        flush=True,
    )
    if not state.finished:
        raise SystemExit(143)  # ended by SIGTERM, as a shell would report it


if __name__ == "__main__":
    main(sys.argv[1:])
