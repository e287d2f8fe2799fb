"""Every sequence architecture is a policy: an iteration of PPO with it; what sampling saw is what learning computes."""

import dataclasses

import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

import models
from models import registry
from models.config import to_text
from rl.config import Run, configure
from rl.module import Config

SMALL = Config(dim=32, layers=2, context=12, max_seq_len=5)
ROWS = [name for kind in ("mixer", "pattern", "ffn", "block", "score", "position") for name in models.names(kind=kind)]
ENVS = {"engram": "FrozenLake-v1"}  # looks up what it reads, so observations must be tokens


def policy(name):
    """The policy's config with the part of this name in its place."""
    kind = registry.kind_of(name)
    if kind == "pattern":
        return dataclasses.replace(SMALL, model=name, layers=3)
    cls = registry.lookup(name)
    field, host = registry.HOSTS[kind]
    part = host.format(to_text(cls.Config(**registry.tiny_options(cls))))
    return dataclasses.replace(SMALL, model=f"decoder({field}={part})")


@pytest.mark.parametrize(
    "name", [name for name in ROWS if models.build(name).causal and not models.build(name).needs_memory]
)
def test_it_steps_in_an_environment(cluster, name):
    run = Run(
        env=ENVS.get(name, "CartPole-v1"), runners=0, rows=3, batch=100, minibatch=100, epochs=1, model=policy(name)
    )
    algo = configure(run).build_algo()
    learner = algo.learner_group._learner
    module = learner.module[DEFAULT_MODULE_ID]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    chunks = algo.env_runner.sample(num_timesteps=100)
    batch = learner._learner_connector(rl_module=learner.module, batch={}, episodes=chunks, shared_data={})
    batch = batch[DEFAULT_MODULE_ID]
    with torch.no_grad():
        out = module.forward_train(batch)
    logp = module.get_train_action_dist_cls().from_logits(out[Columns.ACTION_DIST_INPUTS]).logp(batch[Columns.ACTIONS])
    assert (logp - batch[Columns.ACTION_LOGP])[batch[Columns.LOSS_MASK]].abs().max() < 1e-4
    result = algo.train()
    assert result["num_env_steps_sampled_lifetime"] >= 100
    assert any(not torch.equal(value, before[key]) for key, value in module.state_dict().items())
    algo.stop()
