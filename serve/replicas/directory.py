"""Where the replicas of each model are: replicas announce themselves, gateways look.

It holds nothing that cannot be told again. Replicas repeat themselves, so one that starts anew knows all of them within
seconds; and gateways keep their connections without it.
"""

import asyncio
import time
from dataclasses import dataclass, field

from ray import serve

ANNOUNCE_SECONDS = 2.0
LEASE_SECONDS = 10.0  # of an announcement that is not repeated
LOOK_SECONDS = 3.0  # a look waits so long for news


@dataclass(frozen=True)
class Model:
    """What a gateway must know of a model before any of its replicas is there. source: folder or URI of the checkpoint.

    engine: edifice or vllm. application: of Ray Serve, that runs its replicas, when it was loaded while the server ran.
    """

    name: str
    source: str
    vocab: int
    max_len: int
    engine: str = "edifice"
    application: str = ""


@dataclass(frozen=True)
class Place:
    """One replica. pid: of its process on `host`. secret: what a gateway must know to come in."""

    model: Model
    replica: str
    pid: int
    host: str
    port: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class News:
    """All that is known. version: to be given with the next look."""

    version: int
    models: dict[str, Model]
    places: list[Place]


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=1)
class Directory:
    def __init__(self) -> None:
        self._version = time.time_ns()  # differs from those of another life
        self._models: dict[str, Model] = {}
        self._unloaded: set[Model] = set()  # whose replicas may still announce themselves
        self._places: dict[str, tuple[Place, float]] = {}
        self._changed = asyncio.Event()

    async def announce(self, place: Place) -> None:
        """A replica is there, and will say so again. One of an unloaded model is not listened to."""
        if place.model in self._unloaded:
            return
        known = self._places.get(place.replica)
        self._places[place.replica] = place, time.monotonic()
        if known is None:
            self._models.setdefault(place.model.name, place.model)
            self._change()

    async def withdraw(self, replica: str) -> None:
        """A replica leaves."""
        if self._places.pop(replica, None) is not None:
            self._change()

    async def load(self, model: Model) -> None:
        """A model will have replicas, now or later."""
        self._unloaded.discard(model)
        self._models[model.name] = model
        self._change()

    async def unload(self, name: str) -> None:
        """No more requests for a model."""
        model = self._models.pop(name, None)
        if model is not None:
            self._unloaded.add(model)
            self._places = {key: kept for key, kept in self._places.items() if kept[0].model != model}
            self._change()

    async def look(self, version: int = 0) -> News:
        """What is known, as soon as it is something else than at `version`, or after a while."""
        if version == self._version:
            try:
                await asyncio.wait_for(self._changed.wait(), LOOK_SECONDS)
            except TimeoutError:
                pass
        now = time.monotonic()
        self._places = {key: kept for key, kept in self._places.items() if now - kept[1] < LEASE_SECONDS}
        return News(self._version, dict(self._models), [place for place, _ in self._places.values()])

    def _change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
