"""Models come and go while the server runs: POST /admin/models, DELETE /admin/models/NAME, for keys with `admin`."""

import asyncio
from dataclasses import replace
from typing import Any

from click import ClickException
from fastapi import APIRouter

from serve.app import Options, label, located
from serve.http.errors import APIError
from serve.replicas.shelf import Shelf


def routes(shelf: Shelf, first: set[str]) -> APIRouter:
    """first: names of the models that the server was started with."""
    router = APIRouter(prefix="/admin", include_in_schema=False)

    @router.post("/models", status_code=201)
    async def load(options: Options) -> dict[str, Any]:
        try:
            model, _ = await asyncio.to_thread(located, options)
        except (ClickException, KeyError) as error:
            raise APIError(400, str(error), "model") from None
        if shelf.has(model.name):
            raise APIError(409, f"there is a model {model.name!r} already; unload it first", "name")
        try:
            await shelf.load(replace(model, application=f"model {label(model.name)}"), options)
        except APIError:
            await shelf.forget(model.name)
            raise
        return {"id": model.name, "object": "model", "source": model.source}

    @router.delete("/models/{name:path}")
    async def unload(name: str) -> dict[str, Any]:
        if name in first:
            raise APIError(409, f"the server was started with {name!r}; start it without", "name")
        if not shelf.has(name):
            raise APIError(404, f"there is no model {name!r}", "name", "model_not_found")
        await shelf.forget(name)
        return {"id": name, "object": "model", "deleted": True}

    return router
