"""The command: it learns, stores and goes on, compares with RLlib's default module, and says what is wrong."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from cluster import storage
from rl import checkpoint, envs, ppo
from rl.config import Run, configure
from rl.module import Config


def best(progress) -> float:
    return max((one.episode_return for one in progress if not math.isnan(one.episode_return)), default=0.0)


def learn(env: str, pattern: str, steps: int, enough: float, anneal: bool = False) -> list[ppo.Progress]:
    """Progress of a run, which ends early once its return is `enough`."""
    torch.manual_seed(0)
    algo = configure(Run(env=env, runners=0, steps=steps, anneal=anneal, model=Config(pattern=pattern))).build_algo()
    seen = []
    for one in ppo.iterate(algo, steps):
        seen.append(one)
        if one.episode_return >= enough:
            break
    algo.stop()
    return seen


def test_return_rises(cluster):
    """A random policy gets about 22."""
    progress = learn("CartPole-v1", "gated_deltanet", 20_000, 80)
    assert best(progress) >= 80, [round(one.episode_return) for one in progress]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gqa", "gated_deltanet"])
def test_cartpole_reaches_450(cluster, pattern):
    assert best(learn("CartPole-v1", pattern, 200_000, 450)) >= 450


@pytest.mark.slow
def test_cartpole_without_velocities_needs_and_gets_memory(cluster):
    """Attention over one step is a policy without memory: in 60,000 steps it stays low."""
    assert best(learn("cartpole_memory", "gated_deltanet", 120_000, 200, anneal=True)) >= 200
    forgetful = best(learn("cartpole_memory", "gqa(window=1)", 60_000, 200))
    assert forgetful < 120, forgetful


def test_a_stored_run_goes_on(cluster, home, capsys):
    small = {"model": Config(dim=16, context=8, max_seq_len=8), "runners": 0, "rows": 2, "batch": 64, "minibatch": 32}
    first = ppo.train(ppo.Command(**small, steps=64, name="pole", every=1))["edifice"]
    parent = storage.join(storage.home(), "runs", "pole", "checkpoints")
    assert checkpoint.run_of(checkpoint.latest(parent)).model == small["model"]
    second = ppo.train(ppo.Command(**small, steps=200, name="pole", every=1))["edifice"]
    assert second[0].iteration == first[-1].iteration + 1 and second[0].steps > first[-1].steps
    assert second[-1].steps >= 200 and len(list((home / "runs/pole/checkpoints").iterdir())) == checkpoint.KEEP
    with pytest.raises(ValueError, match="lr: 0.001 was, 0.5 is"):
        ppo.train(ppo.Command(**small, steps=200, name="pole", lr=0.5))
    assert "steps/s" in capsys.readouterr().out
    assert not list(home.rglob("*.pkl"))


def test_compare_prints_both_speeds(cluster, capsys):
    arguments = (
        "CartPole-v1 --pattern lstm --dim 16 --steps 200 --runners 0 --rows 2 --batch 100 --minibatch 50 --compare"
    )
    ppo.main(arguments.split())
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("edifice step") and out[1].startswith("rllib   step")
    assert out[-3].startswith("edifice: ") and out[-2].startswith("rllib: ") and "edifice / rllib" in out[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("CartPol-v1", "no environment 'CartPol-v1'"),
        ("CartPole-v1 --pattrn gqa", "did you mean --pattern?"),
        ("CartPole-v1 --dim x", "--dim"),
        ("CartPole-v1 --batch 0", "batch=0"),
        ("CartPole-v1 --batch 10 --minibatch 20", "minibatch=20"),
        ("CartPole-v1 --pattern gqq", "no architecture is called 'gqq'"),
        ("CartPole-v1 --dim 30", "multiple"),
    ],
)
def test_mistakes_get_one_line(cluster, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        ppo.main(arguments.split())
    error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and message in error[0], error


def test_the_mean_return_is_over_enough_episodes(monkeypatch):
    """Iterations finish 30, 0, 5 and 18 episodes: the last mean is over 5 + 18, the one before over 30 + 5."""
    found = iter([(30, 1.0), (0, math.nan), (5, 2.0), (18, 4.0)])

    class Fake:
        iteration = steps = 0

        def train(self):
            count, mean = next(found)
            self.steps += 1
            return {"env_runners": {"num_episodes": count, "episode_return_mean": mean}}

    monkeypatch.setattr(checkpoint, "steps", lambda algo: algo.steps)
    means = [one.episode_return for one in ppo.iterate(Fake(), 4)]
    assert means == pytest.approx([1.0, 1.0, (30 + 10) / 35, (10 + 72) / 23])


def test_environments():
    assert envs.names() == ["cartpole_memory"]
    env = envs.find("cartpole_memory")()
    observation, _ = env.reset(seed=0)
    assert observation.shape == (2,) and env.observation_space.contains(observation)
    full = gym.make("CartPole-v1").reset(seed=0)[0]
    assert np.array_equal(observation, full[[0, 2]])


def test_observations_of_several_parts_are_flattened(cluster):
    algo = configure(Run(env="Parts-v0", runners=0, rows=2, batch=64, minibatch=32, model=Config(dim=16))).build_algo()
    assert algo.get_module().observation_space.shape == (3,)
    algo.train()
    algo.stop()


class Parts(gym.Env):
    """One step; a dict of a flag and a vector, and continuous actions outside of which it would raise."""

    observation_space = gym.spaces.Dict(flag=gym.spaces.Discrete(2), vector=gym.spaces.Box(0, 1, (1,)))
    action_space = gym.spaces.Box(3.0, 4.0, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 1.0, True, False, {}


gym.register("Parts-v0", entry_point=Parts)
