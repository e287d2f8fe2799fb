"""The page at /: plain files of serve/web, and the numbers it shows.

Nothing of it comes from anywhere else, and its policy forbids the browser to load, run or send to anything else: even
if a model's output became HTML, it could do nothing.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from serve.http.served import Service

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES = {path.name: path for path in (Path(__file__).parent / "web").iterdir() if path.suffix in _TYPES}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask again, mostly for a 304
}


def is_open(path: str) -> bool:
    """Whether `path` is part of the page, which holds no secrets and is where a browser's user can give a key."""
    return path == "/" or path.startswith("/web/")


def routes(service: Service) -> APIRouter:
    """The page, its files, and /stats: by model, whether it takes chats and its backend's numbers."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: HTTPRequest) -> Response:
        return _file(request, "index.html")

    @router.get("/web/{name}")
    async def file(request: HTTPRequest, name: str) -> Response:
        return _file(request, name)

    @router.get("/stats")
    async def stats() -> dict[str, Any]:
        return {"models": {name: _numbers(served) for name, served in dict(service.models).items()}}

    return router


def _file(request: HTTPRequest, name: str) -> Response:
    if name not in FILES:
        raise HTTPException(404, "the page has no such file")
    content = FILES[name].read_bytes()
    headers = {**HEADERS, "ETag": f'"{sha256(content).hexdigest()[:16]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_TYPES[FILES[name].suffix], headers=headers)


def _numbers(served: Any) -> dict[str, Any]:
    numbers = {name: value for name, value in served.backend.stats().items() if "_le_" not in name}  # no histograms
    return {"chat": served.template is not None, "max_len": served.prompts.longest, **numbers}
