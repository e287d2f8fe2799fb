"""The policy: what it samples step by step and what the learner computes from a fragment's start are the same."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.utils.postprocessing.zero_padding import unpad_data_if_necessary

from models import registry
from models.config import to_text
from rl.config import Run, configure
from rl.module import Config, Policy, make_config, stack

SMALL = Config(dim=32, layers=2, context=12, max_seq_len=5)
BOX = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
TWO = gym.spaces.Discrete(2)
MIXERS = registry.names(kind="mixer")


def policy(pattern="gqa", observations=BOX, actions=TWO, **options) -> Policy:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, pattern=pattern, **options)
    module = Policy(observation_space=observations, action_space=actions, model_config=dataclasses.asdict(config))
    sharpen(module)
    return module


@torch.no_grad()
def sharpen(module: Policy) -> None:
    """Weights that a first policy keeps at zero or almost are redrawn, so that all of the module shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.abs().max() < 0.02:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    module.policy.weight.copy_(torch.randn(module.policy.weight.shape, generator=generator))


def walk(module: Policy, obs_BT: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
    """Logits (B, T, A) as sampling computes them, and the state before each step."""
    state = module.init_state(len(obs_BT))
    outputs, states = [], []
    for t in range(obs_BT.shape[1]):
        states.append(state)
        out = module.forward_exploration({Columns.OBS: obs_BT[:, t : t + 1], Columns.STATE_IN: state})
        outputs.append(out[Columns.ACTION_DIST_INPUTS])
        state = out[Columns.STATE_OUT]
    return torch.cat(outputs, 1), states


@pytest.mark.parametrize("pattern", [*MIXERS, "gated_deltanet gqa"])
def test_training_computes_what_sampling_computed(pattern):
    """Also long after the episode has outgrown its context."""
    module = policy(pattern)
    obs_BT3 = torch.randn(2, 40, 3)
    logits_BTA, states = walk(module, obs_BT3)
    for start in (0, 5, 11, 25, 30):
        batch = {
            Columns.OBS: obs_BT3[:, start : start + 7],
            Columns.STATE_IN: {n: v.clone() for n, v in states[start].items()},
        }
        trained = module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
        torch.testing.assert_close(trained, logits_BTA[:, start : start + 7].clone(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", MIXERS)
def test_memory_is_used_and_state_stays_bounded(pattern):
    module = policy(pattern)
    obs_BT3 = torch.randn(1, 30, 3)
    other = obs_BT3.clone()
    other[:, 26] += 1
    (one, states), (two, _) = walk(module, obs_BT3), walk(module, other)
    assert not torch.allclose(one[:, 27:], two[:, 27:], atol=1e-5), "no later step depends on an earlier one"
    shapes = {name: value.shape[1:] for name, value in states[29].items()}
    assert shapes == {name: value.shape for name, value in module.get_initial_state().items()}


def test_attention_sees_the_last_context_steps_and_no_more():
    module = policy("gqa", layers=1)
    obs_BT3 = torch.randn(1, 30, 3)
    logits, _ = walk(module, obs_BT3)
    for changed, moved in ((29 - SMALL.context, False), (30 - SMALL.context, True)):
        other = obs_BT3.clone()
        other[:, changed] += 1
        difference = (walk(module, other)[0][:, 29] - logits[:, 29]).abs().max()
        assert (difference > 1e-6) == moved, f"step 29 and step {changed}: {difference}"


def test_unbounded_memory_begins_afresh_every_context_steps():
    """MLA has no window: the steps of one stretch of `context` see each other and nothing before."""
    module = policy("mla")
    assert module._restarts
    obs_BT3 = torch.randn(2, 3 * SMALL.context, 3)
    logits, _ = walk(module, obs_BT3)
    for start in (SMALL.context, 2 * SMALL.context):
        alone, _ = walk(module, obs_BT3[:, start : start + SMALL.context])
        torch.testing.assert_close(
            logits[:, start : start + SMALL.context].clone(), alone.clone(), atol=1e-4, rtol=1e-4
        )


def test_initial_state_is_that_of_one_row_in_numpy():
    module = policy("gated_deltanet gqa")
    initial, rows = module.get_initial_state(), module.init_state(3)
    assert module.is_stateful() and set(initial) == set(rows)
    for name, value in initial.items():
        assert isinstance(value, np.ndarray) and value.dtype in (np.float32, np.int64)
        assert torch.equal(rows[name], torch.from_numpy(value).expand(3, *value.shape))


@pytest.mark.parametrize(
    "observations, obs_BT",
    [(gym.spaces.Discrete(7), torch.arange(6).view(2, 3)), (gym.spaces.Box(0, 1, (2, 4)), torch.rand(2, 3, 2, 4))],
)
@pytest.mark.parametrize("actions, width", [(gym.spaces.Discrete(3), 3), (gym.spaces.Box(-1, 1, (2,)), 4)])
def test_spaces(observations, obs_BT, actions, width):
    module = policy("gqa", observations, actions)
    out = module.forward_train({Columns.OBS: obs_BT, Columns.STATE_IN: module.init_state(2)})
    assert out[Columns.ACTION_DIST_INPUTS].shape == (2, 3, width)
    assert module.compute_values({}, out[Columns.EMBEDDINGS]).shape == (2, 3)


def test_values_are_the_same_with_and_without_embeddings():
    module = policy("gated_deltanet")
    batch = {Columns.OBS: torch.randn(2, 4, 3), Columns.STATE_IN: module.init_state(2)}
    embeddings = module.forward_train(batch)[Columns.EMBEDDINGS]
    assert torch.equal(module.compute_values(batch), module.compute_values(batch, embeddings))


def test_every_parameter_gets_a_gradient():
    for name in MIXERS:
        cls = registry.lookup(name)
        pattern = to_text(cls.Config(**registry.tiny_options(cls)))  # sizes that a few steps fill
        module = policy(pattern, context=24)
        out = module.forward_train({Columns.OBS: torch.randn(50, 24, 3), Columns.STATE_IN: module.init_state(50)})
        loss = out[Columns.ACTION_DIST_INPUTS].square().sum() + module.compute_values({}, out[Columns.EMBEDDINGS]).sum()
        loss.backward()
        missing = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing, f"{pattern}: no gradient reaches {missing}"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: policy("gqa(mask=full)"), "causal"),
        (lambda: stack(Config(model="decoder(ffn=soft_moe)")), "soft_moe.*causal"),
        (lambda: stack(Config(model="encoder_decoder")), "encoder_decoder.*encoder's output"),
        (lambda: policy(observations=gym.spaces.MultiBinary(3)), "Box or Discrete"),
        (lambda: policy("gqq"), "did you mean"),
        (lambda: Config(context=0), "context=0"),
        (lambda: make_config({"contxt": 3}), "contxt"),
    ],
)
def test_mistakes_get_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        change()
    assert "\n" not in str(error.value)


# -- through RLlib ---------------------------------------------------------------------------------------------------


def sampled(run: Run, rounds: int):
    """An algorithm that samples in this process, and the episode chunks of a few calls."""
    algo = configure(run).build_algo()
    learner = algo.learner_group._learner
    sharpen(learner.module[DEFAULT_MODULE_ID])
    algo.env_runner.module.set_state(learner.module[DEFAULT_MODULE_ID].get_state())
    chunks = []
    for _ in range(rounds):
        chunks.append(algo.env_runner.sample(num_timesteps=130))
    return algo, learner, chunks


@pytest.mark.parametrize("pattern", ["gqa", "sliding_window", "gated_deltanet", "mamba_ssd", "lstm", "rwkv7"])
def test_the_learner_recomputes_the_runners_log_probabilities(cluster, pattern):
    """From stored fragment starts alone, over chunks that were cut, episodes that ended, and padding."""
    run = Run(runners=0, rows=3, batch=100, minibatch=100, model=dataclasses.replace(SMALL, pattern=pattern))
    algo, learner, rounds = sampled(run, 3)
    module = learner.module[DEFAULT_MODULE_ID]
    continued = 0
    for chunks in rounds:
        continued += sum(chunk.t_started > 0 for chunk in chunks)
        lengths = [len(chunk) for chunk in chunks]
        # The value each chunk is bootstrapped from, by sampling's own arithmetic from the last stored fragment start.
        last = [bootstrap(module, chunk) for chunk in chunks]
        batch = learner._learner_connector(rl_module=learner.module, batch={}, episodes=chunks, shared_data={})
        batch = batch[DEFAULT_MODULE_ID]
        mask = batch[Columns.LOSS_MASK]
        assert int(mask.sum()) == sum(lengths) and mask.shape[1] == SMALL.max_seq_len
        out = module.forward_train(batch)
        kind = module.get_train_action_dist_cls()
        logp = kind.from_logits(out[Columns.ACTION_DIST_INPUTS]).logp(batch[Columns.ACTIONS])
        assert (logp - batch[Columns.ACTION_LOGP])[mask].abs().max() < 1e-4
        assert batch[Columns.ACTION_LOGP][mask].std() > 0.05, "the policy is flat, so that nothing is compared"
        values = module.compute_values(batch).detach().numpy()
        values = unpad_data_if_necessary([length + 1 for length in lengths], values)
        ends = np.cumsum([length + 1 for length in lengths]) - 1
        assert np.abs(values[ends] - np.array(last)).max() < 1e-4, "the bootstrap step is not what sampling would see"
    assert continued, "no chunk continued an episode"
    algo.stop()


@torch.no_grad()
def bootstrap(module: Policy, chunk) -> float:
    """Value of the chunk's last observation, walked step by step from the chunk's first stored state."""
    state = {
        n: torch.from_numpy(np.asarray(v))[None]
        for n, v in chunk.custom_data["fragment_starts"][chunk.t_started].items()
    }
    for obs in chunk.get_observations():
        x_BTD, state = module.step(torch.from_numpy(obs)[None, None], state)
    return float(module.value(x_BTD))


def test_only_fragment_starts_are_stored(cluster):
    run = Run(runners=0, rows=3, batch=100, minibatch=100, model=SMALL)
    algo, _, rounds = sampled(run, 2)
    for chunk in [chunk for chunks in rounds for chunk in chunks]:
        assert Columns.STATE_OUT not in chunk.extra_model_outputs
        steps = sorted(chunk.custom_data["fragment_starts"])
        assert steps == list(range(chunk.t_started, chunk.t + 1, SMALL.max_seq_len))
    algo.stop()


def test_several_learners_are_refused():
    config = configure(Run(model=SMALL)).learners(num_learners=2)
    with pytest.raises(ValueError, match="num_learners=2"):
        config.validate()
