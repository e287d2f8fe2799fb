"""A run goes on from its checkpoint: every runner holds the learner's weights, and counters and schedules survive."""

import dataclasses
import json
import os
import signal
import time
from collections import deque

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID

from cluster import folder
from rl import checkpoint
from rl.config import Run, configure
from rl.module import Config

RUN = Run(
    runners=2,
    rows=2,
    batch=96,
    minibatch=48,
    epochs=2,
    steps=2000,
    anneal=True,
    kl=0.2,
    model=Config(pattern="gated_deltanet gqa", dim=32, layers=2, context=16, max_seq_len=8),
)


def learner_state(algo) -> dict:
    """What a restored learner must hold: weights, moments, learning rate, KL coefficient, counters."""
    learner = algo.learner_group._learner
    (optimizer,) = learner._named_optimizers.values()
    moments = [optimizer.state[p] for p in learner.module[DEFAULT_MODULE_ID].parameters()]
    return {
        "weights": {name: value.clone() for name, value in learner.module[DEFAULT_MODULE_ID].state_dict().items()},
        "moments": [{name: value.clone() for name, value in one.items()} for one in moments],
        "lr": optimizer.param_groups[0]["lr"],
        "kl": float(learner.curr_kl_coeffs_per_module[DEFAULT_MODULE_ID]),
        "number": learner._weights_seq_no,
        "steps": checkpoint.steps(algo),
        "iteration": algo.iteration,
    }


def same(one, two) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def runner_weights(algo) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Of every runner: the number of the weights it holds, and the weights."""
    return algo.env_runner_group.foreach_env_runner(lambda runner: (runner._weights_seq_no, runner.module.get_state()))


def assert_runners_hold(algo, state) -> None:
    found = runner_weights(algo)
    assert len(found) == 3  # the local one and two remote ones
    for number, weights in found:
        assert number == state["number"]
        assert same({name: torch.from_numpy(value) for name, value in weights.items()}, state["weights"])


@pytest.mark.parametrize("restores", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_restores(cluster, tmp_path, restores):
    algo = configure(RUN).build_algo()
    for _ in range(3):
        algo.train()
    before = learner_state(algo)
    uri = checkpoint.save(algo, RUN, str(tmp_path / "checkpoints"))
    algo.stop()
    assert before["steps"] >= 3 * RUN.batch and before["iteration"] == 3 and before["number"] > 0
    assert before["lr"] < RUN.lr and before["kl"] != RUN.kl, "nothing has moved: the test shows nothing"
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"manifest.json", "state.json", "state.safetensors"}
    for restore in range(restores):
        assert checkpoint.latest(str(tmp_path / "checkpoints")) == uri
        algo = checkpoint.load(uri)
        assert same(learner_state(algo), before)
        assert_runners_hold(algo, before)
        if restore + 1 < restores:
            algo.stop()
    result = algo.train()
    after = learner_state(algo)
    assert after["iteration"] == 4 and result["training_iteration"] == 4
    assert after["steps"] > before["steps"] and after["lr"] < before["lr"]
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] == after["steps"]
    checkpoint.check_weights(algo)
    algo.env_runner._weights_seq_no = 0
    with pytest.raises(RuntimeError, match="EnvRunners hold weights"):
        checkpoint.check_weights(algo)
    algo.stop()


def test_a_killed_runner_does_not_end_the_run(cluster):
    algo = configure(dataclasses.replace(RUN, anneal=False)).build_algo()
    algo.train()
    group = algo.env_runner_group
    before = checkpoint.steps(algo)
    os.kill(group.foreach_env_runner(lambda runner: os.getpid(), local_env_runner=False)[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while checkpoint.steps(algo) == before or group.num_healthy_remote_workers() < 2:
        assert time.monotonic() < deadline, "the killed runner did not come back"
        algo.train()
    algo.train()
    assert group.num_healthy_remote_workers() == 2
    assert_runners_hold(algo, learner_state(algo))
    algo.stop()


def test_a_damaged_checkpoint_is_refused_by_name(cluster, tmp_path):
    run = dataclasses.replace(RUN, runners=0)
    algo = configure(run).build_algo()
    uri = checkpoint.save(algo, run, str(tmp_path))
    algo.stop()
    file = tmp_path / uri.rsplit("/", 1)[1] / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(folder.Damaged, match="state.safetensors"):
        checkpoint.load(uri)


def test_trees_survive_json():
    tree = {
        "a": [1, 2.5, None, True, "x", float("inf")],
        3: (1, {"b": ()}),
        "c": {"d": np.arange(3, dtype=np.float32), "e": np.float64(0.1), "f": torch.ones(2, 0), "g": np.array(7)},
        "h": deque([1, 2], maxlen=5),
    }
    tensors = {}
    back = checkpoint._from_json(json.loads(json.dumps(checkpoint._to_json(tree, tensors))), tensors)
    assert list(back) == list(tree) and back["a"] == tree["a"] and back[3] == tree[3] and back["h"] == tree["h"]
    assert back["h"].maxlen == 5
    for name, value in tree["c"].items():
        assert type(back["c"][name]) is type(value) and back["c"][name].dtype == value.dtype
        assert back["c"][name].shape == value.shape and (back["c"][name] == value).all()
    with pytest.raises(TypeError, match="function"):
        checkpoint._to_json({"f": test_trees_survive_json}, {})


def test_a_run_survives_json():
    assert checkpoint.from_json(json.loads(json.dumps(checkpoint.to_json(RUN)))) == RUN
