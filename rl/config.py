"""A PPO run, and the RLlib algorithm it is: PPOConfig with our policy, and state that stays in the EnvRunners."""

import dataclasses
from typing import Annotated

import gymnasium as gym
import tyro
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.common import AddStatesFromEpisodesToBatch
from ray.rllib.connectors.connector_pipeline_v2 import ConnectorPipelineV2
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rl import envs
from rl.fragments import Act, Carry, FragmentStates
from rl.module import Config, Policy, make_config, stack


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    env:      an environment of rl/envs or an id of Gymnasium. model: the policy. steps: of all environments together.
    runners:  processes that sample, 0: this one does. rows: environments of each. batch: steps of an iteration.
    epochs:   passes over a batch. minibatch: steps of an update. anneal: the learning rate falls to 0 over `steps`.
    value:    weight of the value loss. kl: of the penalty on leaving the old policy, to begin with; 0: none.
    """

    env: tyro.conf.Positional[str] = "CartPole-v1"
    model: Annotated[Config, tyro.conf.arg(name="")] = Config()
    steps: int = 100_000
    seed: int = 0
    runners: int = 1
    rows: int = 8
    batch: int = 1000
    minibatch: int = 250
    epochs: int = 6
    lr: float = 1e-3
    anneal: bool = False
    gamma: float = 0.99
    gae: float = 0.95
    clip: float = 0.2
    entropy: float = 0.0
    kl: float = 0.0
    value: float = 0.01
    grad_norm: float = 0.5

    def __post_init__(self) -> None:
        for field in ("steps", "rows", "batch", "minibatch", "epochs"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.runners < 0:
            raise ValueError(f"runners={self.runners}: must be 0 (this process samples) or more")
        if self.minibatch > self.batch:
            raise ValueError(f"minibatch={self.minibatch}: must be at most batch={self.batch}")


class BackboneConfig(PPOConfig):
    """PPO for `rl.module.Policy`: own connectors (rl/fragments.py) where RLlib's would store state at every step."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class)
        self.add_default_connectors_to_env_to_module_pipeline = False
        self.add_default_connectors_to_module_to_env_pipeline = False

    def validate(self) -> None:
        super().validate()
        if self.num_learners > 1:
            raise ValueError(
                f"num_learners={self.num_learners}: must be 0 or 1, more would cut episodes at other steps"
            )

    def build_env_to_module_connector(self, env=None, spaces=None, device=None) -> ConnectorPipelineV2:
        pipeline = super().build_env_to_module_connector(env, spaces, device)
        pipeline.append(Carry())
        return pipeline

    def build_module_to_env_connector(self, env=None, spaces=None) -> ConnectorPipelineV2:
        pipeline = super().build_module_to_env_connector(env, spaces)
        pipeline.append(Act(fit="unsquash" if self.normalize_actions else "clip" if self.clip_actions else ""))
        return pipeline

    def build_learner_connector(self, *args, **kwargs) -> ConnectorPipelineV2:
        pipeline = super().build_learner_connector(*args, **kwargs)
        pipeline.insert_before(AddStatesFromEpisodesToBatch, FragmentStates())
        return pipeline


def to_json(run: Run) -> dict:
    """A run as plain JSON values."""
    return dataclasses.asdict(run)


def from_json(record: dict) -> Run:
    """The inverse of `to_json`; ValueError or TypeError for what a run does not have."""
    return Run(**{**record, "model": make_config(record["model"])})


def configure(run: Run, ours: bool = True) -> PPOConfig:
    """The RLlib config of a run; ours=False: with RLlib's default module and connectors, all else equal.

    ValueError, one line, for an environment or a policy that cannot be.
    """
    stack(run.model)  # a mistake is told here; in a runner it would drown in traces
    spec = RLModuleSpec(module_class=Policy, model_config=dataclasses.asdict(run.model)) if ours else None
    config = (
        (BackboneConfig() if ours else PPOConfig())
        .environment(envs.find(run.env))
        .env_runners(
            num_env_runners=run.runners,
            num_envs_per_env_runner=run.rows,
            env_to_module_connector=_flat,
        )
        .training(
            lr=[[0, run.lr], [run.steps, 0.0]] if run.anneal else run.lr,
            gamma=run.gamma,
            lambda_=run.gae,
            clip_param=run.clip,
            entropy_coeff=run.entropy,
            vf_loss_coeff=run.value,
            vf_clip_param=float("inf"),
            grad_clip=run.grad_norm,
            train_batch_size_per_learner=run.batch,
            minibatch_size=run.minibatch,
            num_epochs=run.epochs,
            use_kl_loss=run.kl > 0,
            kl_coeff=run.kl,
        )
        .fault_tolerance(
            restart_failed_env_runners=True, delay_between_env_runner_restarts_s=0, env_runner_health_probe_timeout_s=10
        )
        .debugging(seed=run.seed, log_level="ERROR")
    )
    return config.rl_module(rl_module_spec=spec) if ours else config


def _flat(env, spaces, device) -> list:
    """Observations of several parts become one vector."""
    space = env.single_observation_space if env is not None else spaces["__env_single__"][0]
    return [] if isinstance(space, gym.spaces.Box | gym.spaces.Discrete) else [FlattenObservations()]
