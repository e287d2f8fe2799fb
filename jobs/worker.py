"""What a Ray Train worker runs, and how a driver starts the group of them.

Ray Train places workers, joins them in a process group and starts the group again when one dies. What they go on from
is the run's own newest checkpoint; Ray Train's checkpoints are not used.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from jobs.config import Job, from_json, to_json

STOP, ERROR = "stop", "error.txt"  # files in a run: asks the workers to save and end; what a worker's user did wrong


def worker(config: dict[str, Any]) -> None:
    """Trains as one rank of the group. A mistake of the user is written to the run, where the driver finds it."""
    import torch
    from ray import train
    from ray.train.torch import get_device

    from jobs.data import prepare
    from jobs.loop import train as loop

    job, run = from_json(config["job"]), Path(config["run"])
    if (run / ERROR).exists():
        return  # the group was started again after an error that would come again
    torch.set_num_threads(config["threads"])
    try:
        loop(
            job,
            prepare(job.data, quiet=True),
            run,
            get_device(),
            stop=(run / STOP).exists,
            say=_say,
        )
    except ValueError as error:
        traceback.print_exc()
        if train.get_context().get_world_rank() == 0 or not (run / ERROR).exists():
            (run / ERROR).write_text(str(error))
        raise


def _say(line: str) -> None:
    """One line for the driver's output. Not print: Ray Train replaces that, and each line would come twice."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run_group(job: Job, run: Path) -> None:
    """Trains with Ray Train on the cluster this process is connected to.

    ValueError: a mistake of the user, from a worker. RuntimeError: workers failed more often than `max_failures`.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if job.device == "cuda" and gpus < job.workers:
        raise ValueError(f"device=cuda: workers={job.workers}, but the cluster has {gpus} GPUs; lower --workers")
    use_gpu = job.device != "cpu" and gpus >= job.workers
    cpus = int(resources.get("CPU", 0))
    if not use_gpu and cpus < job.workers:
        raise ValueError(f"workers={job.workers}: each takes a CPU and the cluster has {cpus}; lower --workers")
    threads = job.threads or max(1, (os.cpu_count() or 1) // (1 if use_gpu else job.workers))
    for name in (STOP, ERROR):
        (run / name).unlink(missing_ok=True)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": to_json(job), "run": str(run), "threads": threads},
        scaling_config=ScalingConfig(num_workers=job.workers, use_gpu=use_gpu),
        run_config=RunConfig(
            # A new name each time: under an old one Ray Train would look for its own checkpoints.
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(run / "ray"),
            failure_config=FailureConfig(max_failures=job.max_failures),
            worker_runtime_env={"env_vars": worker_environment(threads, use_gpu)},
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        if not (run / ERROR).exists():
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise RuntimeError(f"the workers failed: {lines[-1].strip() if lines else type(error).__name__}") from error
    if (run / ERROR).exists():
        raise ValueError((run / ERROR).read_text())


def worker_environment(threads: int, use_gpu: bool) -> dict[str, str]:
    """Environment of the workers: where things live, and the CPU threads they get."""
    from cluster import storage

    # What DeepSpeed compiles on first use (its GPU operators) is kept with the runs.
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR") or storage.join(storage.home(), "torch_extensions")
    variables = {"EDIFICE_HOME": storage.home(), "OMP_NUM_THREADS": str(threads), "TORCH_EXTENSIONS_DIR": compiled}
    return variables if use_gpu else variables | {"DS_ACCELERATOR": "cpu"}


def write_config(run: Path, job: Job) -> None:
    """Stores the resolved job with the run."""
    run.mkdir(parents=True, exist_ok=True)
    part = run / "config.json.part"
    part.write_text(json.dumps(to_json(job), indent=1) + "\n")
    part.replace(run / "config.json")
