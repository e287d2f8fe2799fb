"""The Ray Serve application.

    serve run serve.app:build model=RUN_OR_DIR [name=...] [max_rows=32] [max_len=2048] [memory_bytes=...] [chunk=256]
                              [waiting=256] [replicas=1] [cpus=1] [gpus=0]

RUN is the name of a run under EDIFICE_HOME/runs or its folder, DIR a model folder; a tokenizer_config.json or a
chat_template.jinja in it says how chats become prompts and which further token ends a completion. A replica holds one
engine in a thread; one whose engine broke is replaced. EDIFICE_API_KEYS, comma separated, is read where this command
runs. /metrics tells the numbers of the replica that happens to answer (`serve.metrics`).
"""

import os
from typing import Any

from click import ClickException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application

from cluster import folder, storage


class Arguments(BaseModel):
    """Builder arguments; a command line gives them as text."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1)
    name: str = ""
    max_rows: int = Field(32, ge=1)
    max_len: int = Field(2048, ge=1)
    memory_bytes: int | None = Field(None, ge=1)
    chunk: int = Field(256, ge=1)
    waiting: int = Field(256, ge=0)
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run`. A wrong argument is one line, before Ray does anything."""
    try:
        arguments = Arguments.model_validate(args)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Arguments.model_fields)
        raise ClickException(f"{name}: {first['msg']}; the arguments are name=value of {known}") from None
    path = find(arguments.model)
    options = {key: getattr(arguments, key) for key in ("max_rows", "max_len", "memory_bytes", "chunk")}
    keys = [key.strip() for key in os.environ.get("EDIFICE_API_KEYS", "").split(",") if key.strip()]
    name = arguments.name or storage.split(arguments.model)[1]
    server = Server.options(
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.max_rows + arguments.waiting + 64,  # it is the worker that says 429
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
    )
    return server.bind(path, name, keys, arguments.waiting, options)


def find(model: str) -> str:
    """The absolute path or URI of a run or model folder that is complete. ClickException in one line otherwise."""
    from models import hub

    places = [model if storage.is_uri(model) else os.path.abspath(os.path.expanduser(model))]
    if "/" not in model:
        places.append(storage.join(storage.home(), "runs", model))
    for place in places:
        try:
            if "config.json" in folder.load(hub.locate(place)):
                return place
        except (OSError, ValueError):
            continue
    raise ClickException(
        f"model={model}: neither a model folder nor a run with a complete checkpoint; looked in {' and '.join(places)}"
    )


@serve.deployment(health_check_period_s=5, graceful_shutdown_timeout_s=10)
@serve.ingress()
class Server:
    """One replica: an engine in a thread, and the HTTP routes over it."""

    def __init__(self, path: str, name: str, keys: list[str], waiting: int, options: dict[str, Any]) -> None:
        from serve import engine
        from serve.api import Service
        from serve.chat import Chat
        from serve.sampler import Sampling
        from serve.worker import Worker

        loaded = engine.load(path, **options)
        loaded.generate([[0, 0]], Sampling(max_tokens=2))  # what is slow once, or broken, shows now
        chat = Chat.load(path, loaded.tokenizer)
        replica = serve.get_replica_context().replica_id.unique_id
        self.service = Service(Worker(loaded, waiting), name, keys, chat, replica)

    def __serve_build_asgi_app__(self) -> Any:
        from serve.api import create_app

        return create_app(self.service)

    def check_health(self) -> None:
        self.service.worker.check()
