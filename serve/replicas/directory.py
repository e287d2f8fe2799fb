"""Where the replicas of each model are: replicas announce themselves, gateways look.

It holds nothing that cannot be told again. Replicas repeat themselves, so one that starts anew knows all of them within
seconds; and gateways keep their connections without it.
"""

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ray import serve

ANNOUNCE_SECONDS = 2.0
LEASE_SECONDS = 10.0  # of an announcement that is not repeated
LOOK_SECONDS = 3.0  # a look waits so long for news


@dataclass(frozen=True)
class Model:
    """What a gateway must know of a model before any of its replicas is there. source: folder or URI of the checkpoint.

    engine: edifice or vllm. application: of Ray Serve, that runs its replicas, when it was loaded while the server ran.
    created: when, in seconds of Unix time.
    """

    name: str
    source: str
    vocab: int
    max_len: int
    engine: str = "edifice"
    application: str = ""
    created: int = field(default=0, compare=False)


Loaded = dict[str, tuple[Model, Any]]  # models that came while the server runs, with their options


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
    """All that is known. version, loaded: to be given with the next look."""

    version: int
    models: dict[str, Model]
    places: list[Place]
    loaded: Loaded

    @property
    def shelf(self) -> "Loaded":
        """What is not loaded now."""
        return {name: each for name, each in self.loaded.items() if name not in self.models}


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=1)
class Directory:
    """most: models loaded while the server runs that may be there at once; 0 for any number."""

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._loaded: Loaded = {}
        self._used: dict[str, float] = {}  # when a model had a request the last time
        self._version = self._born = time.time_ns()  # differs from those of another life
        self._complete = time.monotonic() + 2 * ANNOUNCE_SECONDS  # when all replicas have announced themselves
        self._models: dict[str, Model] = {}
        self._unloaded: set[Model] = set()  # whose replicas may still announce themselves
        self._places: dict[str, tuple[Place, float]] = {}
        self._changed = asyncio.Event()

    async def announce(self, place: Place, idle: float) -> None:
        """A replica is there, and will say so again. One of an unloaded model is not listened to.

        idle: seconds without a request.
        """
        if place.model in self._unloaded:
            return
        self._used[place.model.name] = max(self._used.get(place.model.name, 0.0), time.monotonic() - idle)
        known = self._places.get(place.replica)
        self._places[place.replica] = place, time.monotonic()
        if known is None:
            self._models.setdefault(place.model.name, place.model)
            self._change()

    async def withdraw(self, replica: str) -> None:
        """A replica leaves."""
        if self._places.pop(replica, None) is not None:
            self._change()

    async def load(self, model: Model, options: Any, busy: Collection[str]) -> list[Model] | None:
        """A model will have replicas. Returns those that leave for it, whose replicas the caller ends.

        None, and nothing has changed, when too many are there and none of them can leave, for it is one of `busy`.
        """
        there = [one for one in self._models.values() if one.application and one.name != model.name]
        over = max(0, len(there) + 1 - self._most) if self._most else 0
        free = sorted((one for one in there if one.name not in busy), key=lambda one: self._used.get(one.name, 0.0))
        if over > len(free):
            return None
        for one in free[:over]:
            self._unload(one.name)
        self._unloaded.discard(model)
        self._models[model.name] = model
        self._loaded[model.name] = model, options
        self._used[model.name] = time.monotonic()
        self._change()
        return free[:over]

    async def put_away(self, name: str) -> None:
        """No more requests for a model until it is loaded again."""
        self._unload(name)
        self._change()

    async def forget(self, name: str) -> str:
        """No more requests for a model. Returns the application to end, if there is one."""
        model = self._unload(name)
        self._loaded.pop(name, None)
        self._change()
        return model.application if model is not None else ""

    def _unload(self, name: str) -> Model | None:
        model = self._models.pop(name, None)
        if model is not None:
            self._unloaded.add(model)
            self._places = {key: kept for key, kept in self._places.items() if kept[0].model != model}
        return model

    async def look(self, version: int = 0, loaded: Loaded | None = None) -> News:
        """What is known, as soon as it is something else than at `version`, or after a while."""
        if 0 < version < self._born:  # of another life: nothing known then may seem to be gone now
            self._loaded = {**(loaded or {}), **self._loaded}
            await asyncio.sleep(max(0.0, self._complete - time.monotonic()))
        elif version == self._version:
            try:
                await asyncio.wait_for(self._changed.wait(), LOOK_SECONDS)
            except TimeoutError:
                pass
        now = time.monotonic()
        self._places = {key: kept for key, kept in self._places.items() if now - kept[1] < LEASE_SECONDS}
        places = [place for place, _ in self._places.values()]
        return News(self._version, dict(self._models), places, dict(self._loaded))

    def _change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
