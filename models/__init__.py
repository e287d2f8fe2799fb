"""Architectures: parts of one decoder, and self-contained models of the other families.

models.names(family=None, kind=None)   models.build(name, **overrides)   models.card(name)
"""

from models.registry import build, card, names

__all__ = ["build", "card", "names"]
