"""What the endpoint offers: several models behind one address, each by its name."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from serve.grammar import Grammars
from serve.http.keys import Key
from serve.http.limits import Limits
from serve.http.logprobs import Speller
from serve.http.metrics import Metrics
from serve.http.replies import ModelCard
from serve.predict import Predicts
from serve.prompts import Prompts
from serve.template import Template
from serve.worker import Backend, Worker

_LIMITS = Limits()


@dataclass(frozen=True)
class Served:
    """One model behind the endpoint.

    name: as requests give it. backend: answers requests, here (`serve.worker.Worker`) or elsewhere. prompts: checks and
    encodes what comes in, without the model's weights. template: of chats, None when it has none. replica: of this
    gateway, told with the metrics.
    """

    name: str
    backend: Backend
    prompts: Prompts
    template: Template | None = None
    replica: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    grammars: Grammars | None = None  # in the engine's process its own, so that nothing is compiled twice

    def __post_init__(self) -> None:
        if self.grammars is None:
            object.__setattr__(self, "grammars", Grammars(self.prompts.tokenizer, self.prompts.vocab))

    @classmethod
    def local(cls, worker: Worker, name: str, template: Template | None = None, replica: str = "") -> "Served":
        """Over an engine in a thread of this process."""
        return cls(name, worker, worker.engine.prompts, template, replica, grammars=worker.engine.grammars)

    @cached_property
    def speller(self) -> Speller:
        return Speller(self.prompts.tokenizer)

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.backend, self.name, self.replica)


class Shelf(Protocol):
    """Models that are known and not loaded."""

    def cards(self) -> dict[str, ModelCard]:
        """By name."""

    async def bring(self, name: str) -> None:
        """Loads the one of this name, if there is one. APIError when that fails."""


@dataclass(frozen=True)
class Service:
    """What the routes need. models: by name; what is in it when a request comes counts, so it may change at any time.

    keys: API keys; none of them means that only this machine is served. limits: on what one client may ask for.
    predictors: by name, what answers whole inputs under /predict. shelf: what may be added to `models` when asked for.
    """

    models: Mapping[str, Served]
    keys: Sequence[str | Key] = ()
    limits: Limits = _LIMITS
    predictors: Mapping[str, Predicts] = field(default_factory=dict)
    shelf: Shelf | None = None

    def cards(self) -> dict[str, ModelCard]:
        """By name, of all models that answer, be it after they were loaded."""
        shelf = {} if self.shelf is None else self.shelf.cards()
        here = {one.name: ModelCard.of(one.name, one.created, one.prompts.longest) for one in self.models.values()}
        return shelf | here

    @classmethod
    def of(cls, *models: Served, keys: Sequence[str | Key] = (), limits: Limits = _LIMITS) -> "Service":
        return cls({served.name: served for served in models}, keys, limits)
