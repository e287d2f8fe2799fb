"""Reinforcement learning with any of the registered backbones, on RLlib's new API stack."""
