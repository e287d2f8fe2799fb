"""Checkpoints of a PPO run without pickle: what RLlib's get_state returns, as safetensors and JSON, in a folder.

RLlib's own checkpoints are pickles and leave out the adaptive KL coefficients, and its restore can leave EnvRunners on
random weights: it sends each of them two calls and drops the second while the first is still running. `load` waits for
every call, and does not return before every runner has said that it holds the learner's weights.
"""

import json
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE
from ray.rllib.core.learner.learner import Learner
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import Tensor

from cluster import folder, storage
from rl.config import Run, configure, from_json, to_json

PREFIX = "step-"
KEEP = 2  # newest checkpoints of a run that stay


def steps(algo: Algorithm) -> int:
    """Environment steps sampled so far."""
    return int(algo.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0))


def latest(parent: str) -> str | None:
    """The newest complete checkpoint in a folder of them, None when there is none."""
    return folder.latest(parent, PREFIX)


def run_of(uri: str) -> Run:
    """The run a checkpoint belongs to."""
    return from_json(folder.load(uri).meta["run"])


def save(algo: Algorithm, run: Run, parent: str) -> str:
    """Writes `parent/step-...`, drops all but the newest, and returns where it is."""
    learner = algo.learner_group.get_state()[COMPONENT_LEARNER]
    learner.pop("should_module_be_updated")  # part of the config
    state = {
        "iteration": algo.iteration,
        "learner": learner,
        "kl": _on_learner(algo, _kl),
        "metrics": algo.metrics.get_state(),
        "runner": algo.env_runner.get_state(not_components=[COMPONENT_RL_MODULE]),  # connectors, filters
    }
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_to_json(state, tensors))
    uri = storage.join(parent, f"{PREFIX}{steps(algo):010d}")
    folder.write(uri, {"state.json": text, "state.safetensors": tensors}, {"run": to_json(run)})
    folder.prune(parent, KEEP, PREFIX)
    return uri


def load(uri: str, run: Run | None = None) -> Algorithm:
    """A new Algorithm that goes on where `uri` was written; Ray must be up. Stop the old one first: it holds CPUs.

    run: the settings to go on with, the checkpoint's own when None. Damaged, naming the file, when a byte is not what
    was written. Environments begin new episodes, and random streams begin anew.
    """
    stored = folder.load(uri)
    state = _from_json(stored.json("state.json"), stored.tensors("state.safetensors"))
    algo = configure(run or run_of(uri)).build_algo()
    algo.metrics.set_state(state["metrics"])
    algo._iteration = state["iteration"]
    algo.learner_group.set_state({COMPONENT_LEARNER: state["learner"]})
    _on_learner(algo, partial(_resume, kl=state["kl"], steps=steps(algo)))
    share = steps(algo) // max(1, algo.env_runner_group.num_remote_env_runners())
    weights = algo.learner_group.get_state(COMPONENT_LEARNER + "/" + COMPONENT_RL_MODULE, inference_only=True)
    whole = {**state["runner"], **weights[COMPONENT_LEARNER], NUM_ENV_STEPS_SAMPLED_LIFETIME: share}
    place = ray.put(whole)
    # A call that is waited for is never dropped, and comes after those that building the algorithm has left in flight.
    algo.env_runner_group.foreach_env_runner(lambda runner: runner.set_state(ray.get(place)))
    check_weights(algo)
    return algo


def check_weights(algo: Algorithm) -> None:
    """RuntimeError when an EnvRunner does not hold the learner's weights."""
    of_learner = _on_learner(algo, lambda learner: learner._weights_seq_no)
    of_runners = algo.env_runner_group.foreach_env_runner(lambda runner: runner._weights_seq_no)
    if any(number != of_learner for number in of_runners):
        raise RuntimeError(
            f"EnvRunners hold weights {of_runners}, the learner {of_learner}: restoring did not reach them"
        )


# -- the learner ----------------------------------------------------------------------------------------------------


def _on_learner(algo: Algorithm, function) -> Any:
    return next(iter(algo.learner_group.foreach_learner(function))).get()


def _kl(learner: Learner) -> dict[str, float]:
    return {name: float(value) for name, value in learner.curr_kl_coeffs_per_module.items()}


def _resume(learner: Learner, kl: dict[str, float], steps: int) -> None:
    """What a learner's own set_state leaves out."""
    for name, value in kl.items():
        learner.curr_kl_coeffs_per_module[name].data.fill_(value)
    for name in learner.module.keys():
        learner.entropy_coeff_schedulers_per_module[name].update(timestep=steps)


# -- trees as JSON and tensors ----------------------------------------------------------------------------------------


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree of dicts, lists, numbers and arrays; arrays go to `tensors` and are named by their order."""
    for kind, name in ((Tensor, "tensor"), (np.ndarray, "ndarray"), (np.generic, "number")):
        if isinstance(value, kind):  # before float, which np.float64 also is
            key = str(len(tensors))
            tensors[key] = value.detach().cpu() if kind is Tensor else torch.from_numpy(np.array(value))
            return {name: key}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {"dict": [[_to_json(key, tensors), _to_json(item, tensors)] for key, item in value.items()]}
    for kind in (list, tuple):
        if isinstance(value, kind):
            return {kind.__name__: [_to_json(item, tensors) for item in value]}
    if isinstance(value, deque):
        return {"deque": [_to_json(item, tensors) for item in value], "room": value.maxlen}
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}: {value!r}")


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind in ("tensor", "ndarray", "number"):
        tensor = tensors[content].clone()
        return tensor if kind == "tensor" else tensor.numpy() if kind == "ndarray" else tensor.numpy()[()]
    if kind == "dict":
        return {_from_json(key, tensors): _from_json(item, tensors) for key, item in content}
    items = [_from_json(item, tensors) for item in content]
    return {"list": list, "tuple": tuple, "deque": partial(deque, maxlen=value.get("room"))}[kind](items)
