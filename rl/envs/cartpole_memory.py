"""CartPole without velocities: the pole can only be balanced by a policy that remembers where things were."""

import gymnasium as gym
import numpy as np


class CartPoleMemory(gym.ObservationWrapper):
    """Observations (2,) fp32: position of the cart, angle of the pole."""

    def __init__(self, context: dict | None = None) -> None:
        super().__init__(gym.make("CartPole-v1"))
        space = self.env.observation_space
        self.observation_space = gym.spaces.Box(space.low[::2], space.high[::2], dtype=np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[::2]
