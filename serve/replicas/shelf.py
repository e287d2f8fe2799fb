"""Models that are loaded while the server runs. Where only so many may be there at once, the one that nobody has asked
for the longest leaves for another, and comes back when it is asked for: until then the request waits.

A model loaded so is an application of Ray Serve by itself: its replicas are watched and replaced like all others, and
no other model notices. The directory says what leaves and tells every gateway; the gateway that was asked does it.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.app import Options, replicas
from serve.http.errors import APIError
from serve.http.replies import ModelCard
from serve.http.served import Served
from serve.replicas.directory import Model

ROOM_SECONDS = 60.0  # in which one of the others must have nothing to do
LOAD_SECONDS = 300.0  # that a request waits for its model
HERE_SECONDS = 30.0  # in which a gateway finds the replicas of a model that was loaded


class Shelf:
    """Of one gateway. served: models that are there, by name. known: those that are not loaded now."""

    def __init__(self, served: Mapping[str, Served], directory: DeploymentHandle) -> None:
        self.known: dict[str, tuple[Model, Options]] = {}
        self._served, self._directory = served, directory
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()

    def cards(self) -> dict[str, ModelCard]:
        """Of `known`."""
        return {name: ModelCard.of(name, model.created, model.max_len) for name, (model, _) in self.known.items()}

    async def bring(self, name: str) -> None:
        """Loads a model that is known. APIError when that fails; nothing happens to one that is not known."""
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                if name in self._loading:
                    await asyncio.shield(self._loading[name])
                elif name in self.known:
                    await self.load(*self.known[name])
        except TimeoutError:
            message = f"the model {name!r} is still being loaded after {LOAD_SECONDS:g} seconds; try again later"
            raise APIError(503, message, "model", "model_loading") from None

    async def load(self, model: Model, options: Options) -> None:
        """Until a replica is there. APIError when there is no room or it does not start; then it is known only.

        Who asks meanwhile waits for the same, and nobody who leaves stops it.
        """
        if model.name not in self._loading:
            task = self._loading[model.name] = asyncio.create_task(self._load(model, options))
            task.add_done_callback(lambda _: self._loading.pop(model.name))
        await asyncio.shield(self._loading[model.name])

    async def forget(self, name: str) -> None:
        """It leaves, and is not known any more."""
        application = await self._directory.forget.remote(name)
        self.known.pop(name, None)
        if application:
            await asyncio.to_thread(serve.delete, application)

    def has(self, name: str) -> bool:
        """Whether there is, was or will be such a model."""
        return name in self._served or name in self.known or name in self._loading

    async def _load(self, model: Model, options: Options) -> None:
        async with self._turn:
            for other in await self._room(model, options):
                await asyncio.to_thread(serve.delete, other.application)
            try:
                application: Any = replicas(model, options, self._directory)
                await asyncio.to_thread(serve.run, application, name=model.application, route_prefix=None)
                await asyncio.wait_for(self._here(model.name), HERE_SECONDS)
            except Exception as error:
                await self._directory.put_away.remote(model.name)
                await asyncio.to_thread(serve.delete, model.application)
                reason = " ".join(str(error).split())[:500] or type(error).__name__
                raise APIError(500, f"the model {model.name!r} does not start: {reason}", "model") from error

    async def _room(self, model: Model, options: Options) -> list[Model]:
        """The models that must leave; from now on `model` is meant to be there."""
        end = time.monotonic() + ROOM_SECONDS
        while True:
            busy = [name for name, served in self._served.items() if served.backend.busy]
            leaving = await self._directory.load.remote(model, options, busy)
            if leaving is not None:
                return leaving
            if time.monotonic() > end:
                message = f"no room for the model {model.name!r}: all others are at work; try again later"
                raise APIError(503, message, "model", "no_room")
            await asyncio.sleep(0.5)

    async def _here(self, name: str) -> None:
        while name not in self._served or not self._served[name].backend.channels:
            await asyncio.sleep(0.05)
