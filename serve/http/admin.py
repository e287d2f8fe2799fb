"""Models come and go while the server runs: POST /admin/models, DELETE /admin/models/NAME, for keys with `admin`.

A model loaded so is an application of Ray Serve by itself: its replicas are watched and replaced like all others, and
no other model notices. Every gateway learns of it from the directory.
"""

import asyncio
from dataclasses import replace
from typing import Any

from click import ClickException
from fastapi import APIRouter
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.app import Options, located, replicas
from serve.http.errors import APIError
from serve.http.served import Service

HERE_SECONDS = 30.0  # in which a gateway finds the replicas of a model that was loaded


def routes(service: Service, first: set[str], directory: DeploymentHandle) -> APIRouter:
    """first: names of the models that the server was started with."""
    router = APIRouter(prefix="/admin", include_in_schema=False)

    @router.post("/models", status_code=201)
    async def load(options: Options) -> dict[str, Any]:
        try:
            model, _ = await asyncio.to_thread(located, options)
        except (ClickException, KeyError) as error:
            raise APIError(400, str(error), "model") from None
        if model.name in service.models:
            raise APIError(409, f"there is a model {model.name!r} already; unload it first", "name")
        model = replace(model, application=f"model {model.name}")
        await directory.load.remote(model)
        try:
            application = replicas(model, options, directory)
            await asyncio.to_thread(serve.run, application, name=model.application, route_prefix=None)
            await asyncio.wait_for(_here(service, model.name), HERE_SECONDS)
        except Exception as error:
            await _end(model.name, model.application)
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise APIError(500, f"the model {model.name!r} does not start: {reason}", "model") from error
        return {"id": model.name, "object": "model", "source": model.source}

    @router.delete("/models/{name:path}")
    async def unload(name: str) -> dict[str, Any]:
        if name in first:
            raise APIError(409, f"the server was started with {name!r}; start it without", "name")
        if name not in service.models:
            raise APIError(404, f"there is no model {name!r}", "name", "model_not_found")
        await _end(name, f"model {name}")
        return {"id": name, "object": "model", "deleted": True}

    async def _end(name: str, application: str) -> None:
        await directory.unload.remote(name)
        await asyncio.to_thread(serve.delete, application)

    return router


async def _here(service: Service, name: str) -> None:
    while name not in service.models or not service.models[name].backend.channels:
        await asyncio.sleep(0.05)
