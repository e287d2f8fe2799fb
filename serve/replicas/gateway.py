"""The gateway: HTTP for all models, without their weights.

It checks who comes in and what is asked, turns texts into tokens, chooses a replica, and holds each stream: that is
what survives when a replica does not. Any number of gateways may run; they need not know of each other.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.replicas.directory import Model, News, Place

# Nothing here blocks, so it can do without a thread of its own, through which every message would go.
ONE_LOOP = {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}}


@serve.deployment(
    max_ongoing_requests=100_000,
    ray_actor_options={"num_cpus": 0, "runtime_env": ONE_LOOP},
    graceful_shutdown_timeout_s=600,
)
@serve.ingress()
class Gateway:
    """models: that are there from the beginning. replicas: of theirs, which Ray Serve starts with this application.

    predictors: by name, the replicas of models that predict (`serve.replicas.predictors`).
    """

    async def __init__(
        self,
        models: Sequence[Model],
        keys: Any,
        directory: DeploymentHandle,
        replicas: Sequence[DeploymentHandle],
        predictors: Mapping[str, DeploymentHandle],
    ) -> None:
        from serve.http.served import Served, Service
        from serve.replicas.predictors import RemotePredictor
        from serve.replicas.shelf import Shelf

        self.directory, self.first = directory, {model.name for model in models}
        self.known: dict[str, Model] = {}
        found = {name: await RemotePredictor.connect(handle) for name, handle in predictors.items()}
        self.served: dict[str, Served] = {}
        self.shelf = Shelf(self.served, directory)
        self.service = Service(self.served, keys, predictors=found, shelf=self.shelf)
        for model in models:
            await self._add(model)
        self._watching = asyncio.create_task(self._watch())

    def __serve_build_asgi_app__(self) -> Any:
        from serve.http import admin
        from serve.http.api import create_app

        app = create_app(self.service)
        app.include_router(admin.routes(self.shelf, self.first))
        return app

    async def _watch(self) -> None:
        """Follows the directory."""
        version, loaded = 0, {}
        while True:
            try:
                news: News = await self.directory.look.remote(version, loaded)
            except Exception:  # it is being restarted, and what is connected stays so
                await asyncio.sleep(0.5)
                continue
            version, loaded, self.shelf.known = news.version, news.loaded, news.shelf
            for model in news.models.values():
                if model.name not in self.first and not self._has(model):
                    await self._add(model)
            for name in self.known.keys() - news.models.keys() - self.first:
                self._remove(name)
            for place in news.places:
                if self._has(place.model):
                    asyncio.create_task(self._connect(place))

    def _has(self, model: Model) -> bool:
        """With the same weights: what one replica began, another one can finish."""
        known = self.known.get(model.name)
        return known is not None and known.source == model.source

    async def _add(self, model: Model) -> None:
        served = await asyncio.to_thread(_served, model, serve.get_replica_context().replica_id.unique_id)
        if model.name in self.known:
            self._remove(model.name)
        self.known[model.name], self.served[model.name] = model, served

    def _remove(self, name: str) -> None:
        """No new requests; those that run may end."""
        del self.known[name]
        self.served.pop(name).backend.retire()

    async def _connect(self, place: Place) -> None:
        from serve.replicas.remote import Address

        backend = self.served[place.model.name].backend
        with contextlib.suppress(OSError, TimeoutError):  # gone again; if not, the directory says so once more
            await backend.connect(Address(place.replica, place.host, place.port, place.secret))


def _served(model: Model, gateway: str) -> Any:
    """What the routes need of a model, from its folder."""
    from tokenizers import Tokenizer

    from serve.http.served import Served
    from serve.prompts import Prompts
    from serve.replicas.remote import Remote
    from serve.stored import stored
    from serve.template import Template
    from serve.vllm import Refusing

    files = stored(model.source)
    tokenizer = Tokenizer.from_str(files.text("tokenizer.json")) if "tokenizer.json" in files else None
    prompts = (Refusing if model.engine == "vllm" else Prompts)(tokenizer, model.vocab, model.max_len)
    template = Template.load(model.source, tokenizer)
    return Served(model.name, Remote(prompts), prompts, template, gateway, model.created)
