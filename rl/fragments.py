"""How state travels through RLlib: it stays in the EnvRunner as tensors, and only fragment starts are stored.

RLlib's own connectors turn every row's state to numpy, keep it for every step of an episode and stack it again: that
costs more than the policy itself, and an attention cache at every step is what makes sampling run out of memory. Here
`Carry` and `Act` pass the stacked state from one step to the next, and note the state a training fragment will begin
at in the episode; the Learner's `FragmentStates` reads it from there.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action

from models.state import State

STARTS = "fragment_starts"  # in an episode's custom_data: step -> state of its row


class Carry(ConnectorV2):
    """Environment to module: the last observations (B, 1, ...) and the state of each row, fresh for a new episode."""

    def __call__(self, *, rl_module, batch, episodes, shared_data=None, **kwargs) -> dict[str, Any]:
        obs = torch.from_numpy(np.stack([episode.get_observations(-1) for episode in episodes]))
        state = shared_data.get(Columns.STATE_OUT)
        fresh = [row for row, episode in enumerate(episodes) if episode.t == 0]
        if state is None or len(fresh) == len(episodes):
            state = rl_module.init_state(len(episodes))
        elif fresh:
            with torch.inference_mode():
                rows = torch.tensor(fresh)
                initial = rl_module.init_state(len(fresh))
                state = {name: value.index_copy(0, rows, initial[name]) for name, value in state.items()}
        shared_data[Columns.STATE_IN] = state
        _store(state, episodes, [len(episode) % rl_module.settings.max_seq_len == 0 for episode in episodes])
        return {Columns.OBS: obs[:, None], Columns.STATE_IN: state}


class Act(ConnectorV2):
    """Module to environment: keeps the state for the next step, samples actions (B, ...) as numpy.

    fit: what the environment gets of continuous actions: "unsquash" [-1, 1] to its bounds, "clip" to them, or "" as is.
    """

    def __init__(self, *args, fit: str = "", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.fit = {"unsquash": unsquash_action, "clip": clip_action, "": None}[fit]

    def __call__(self, *, rl_module, batch, episodes, explore=None, shared_data=None, **kwargs) -> dict[str, Any]:
        # A chunk that was cut off after `Carry` had run begins here.
        _store(shared_data[Columns.STATE_IN], episodes, [len(episode) == 0 for episode in episodes])
        shared_data[Columns.STATE_OUT] = batch[Columns.STATE_OUT]
        inputs = batch[Columns.ACTION_DIST_INPUTS][:, 0]
        kind = rl_module.get_exploration_action_dist_cls() if explore else rl_module.get_inference_action_dist_cls()
        distribution = kind.from_logits(inputs)
        actions = (distribution if explore else distribution.to_deterministic()).sample()
        to_env = {
            Columns.ACTIONS: actions.numpy(),
            Columns.ACTION_DIST_INPUTS: inputs.numpy(),
            Columns.ACTION_LOGP: distribution.logp(actions).numpy(),
        }
        if self.fit and isinstance(rl_module.action_space, gym.spaces.Box):
            to_env[Columns.ACTIONS_FOR_ENV] = self.fit(to_env[Columns.ACTIONS], rl_module.action_space)
        return to_env


class FragmentStates(ConnectorV2):
    """Learner: the stored state each fragment of `max_seq_len` steps begins at, as STATE_IN."""

    def __call__(self, *, rl_module, batch, episodes, **kwargs) -> dict[str, Any]:
        length = rl_module[DEFAULT_MODULE_ID].settings.max_seq_len
        for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False):
            starts = episode.custom_data[STARTS]
            steps = range(episode.t_started, episode.t_started + len(episode), length)
            states = [starts[step] for step in steps]
            self.add_n_batch_items(batch, Columns.STATE_IN, states, len(states), episode)
        return batch


def _store(state: State, episodes: list[SingleAgentEpisode], here: list[bool]) -> None:
    """Notes the rows of `state` in those episodes that a fragment begins in `here`."""
    if not any(here):
        return
    arrays = {name: value.numpy() for name, value in state.items()}
    for row, episode in enumerate(episodes):
        if here[row]:
            if len(episode) == 0:  # a new chunk, which has inherited the notes of the last one
                episode.custom_data[STARTS] = {}
            episode.custom_data[STARTS][episode.t] = {name: array[row].copy() for name, array in arrays.items()}
