"""The description of the API at /openapi.json: what FastAPI derives from the routes, made exact."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serve.http.served import Service


def describe(app: FastAPI, service: Service) -> None:
    """`app` describes itself with the models that there are when it is asked."""

    def openapi() -> dict[str, Any]:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}, {}] if not service.keys else [{"key": []}]
        for schema in found["components"]["schemas"].values():
            name = schema.get("properties", {}).get("model")
            if (
                name is not None
                and schema.get("additionalProperties") is False
                and "object" not in schema["properties"]
            ):
                name["enum"] = list(service.cards())
        for path, routes in found["paths"].items():
            for route in routes.values():
                route["responses"].pop("422", None)  # what is malformed is 400 here
                if path in ("/health", "/ready", "/ping"):
                    route["security"] = []
        return found

    app.openapi = openapi
