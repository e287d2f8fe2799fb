"""Environments of our own. The file stem is the name: `rl/envs/cartpole_memory.py` defines `CartPoleMemory`."""

import importlib
from pathlib import Path

import gymnasium as gym


def names() -> list[str]:
    """The environments of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def find(name: str) -> str | type[gym.Env]:
    """What RLlib takes as an environment: a class of this folder, or the id of one that Gymnasium knows.

    ValueError lists what there is.
    """
    if name in names():
        module = importlib.import_module(f"rl.envs.{name}")
        return next(value for key, value in vars(module).items() if key.lower() == name.replace("_", ""))
    try:
        gym.spec(name)
    except gym.error.Error as error:
        raise ValueError(
            f"no environment {name!r} ({error}); ours: {', '.join(names())}, or an id of Gymnasium"
        ) from None
    return name
