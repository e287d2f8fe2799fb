"""A replica: one engine in a thread, behind a port for gateways. It speaks no HTTP.

Ray Serve starts it, asks whether it is healthy, and replaces it. What it computes moves elsewhere when it goes
(`serve.replicas.remote`), so it may be killed at any time.
"""

import asyncio
import contextlib
import os
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from serve.replicas.directory import ANNOUNCE_SECONDS, Model, Place

DRAIN_SECONDS = 20.0  # for requests to move, or to end when there is nowhere to move to


@serve.deployment(
    health_check_period_s=1,
    health_check_timeout_s=5,
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=DRAIN_SECONDS + 5,
)
class Replica:
    """options: of `serve.load.load`. waiting, stall: of `serve.worker.Worker`."""

    async def __init__(
        self, model: Model, directory: DeploymentHandle, waiting: int, stall: float, options: dict[str, Any]
    ) -> None:
        from serve.replicas.port import Port

        self.worker = await asyncio.to_thread(_start, model, waiting, stall, options)
        about = {"longest": self.worker.engine.prompts.longest, "limit": self.worker.limit}
        self.port = Port(self.worker, about)
        host = get_node_ip_address()
        name = serve.get_replica_context().replica_id.unique_id
        self.directory = directory
        self.place = Place(model, name, os.getpid(), host, await self.port.listen(host), self.port.secret)
        self._announcing = asyncio.create_task(self._announce())

    def check_health(self) -> None:
        self.port.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {"requests": float(sum(len(line.tags) for line in self.port.lines))}

    async def _announce(self) -> None:
        while self.port.failure is None:
            with contextlib.suppress(Exception):  # the directory itself may be restarting; it is told again
                await self.directory.announce.remote(self.place, self.port.idle)
            await asyncio.sleep(ANNOUNCE_SECONDS)

    async def __del__(self) -> None:
        """Ray Serve calls it before it stops a replica that scales down or is updated."""
        self._announcing.cancel()
        with contextlib.suppress(Exception):
            await self.directory.withdraw.remote(self.place.replica)
        await self.port.drain(DRAIN_SECONDS)
        self.port.close()


def _start(model: Model, waiting: int, stall: float, options: dict[str, Any]) -> Any:
    """The worker of a model. Takes long."""
    from cluster import beside
    from serve import load, vllm
    from serve.worker import Worker, aside

    beside.compute()  # this thread starts those of the engine
    kind, rest = options["engine"], {name: value for name, value in options.items() if name != "engine"}

    def warmed() -> Any:
        engine = (vllm if kind == "vllm" else load).load(model.source, **rest)
        engine.warm()  # what is broken shows now, too
        return engine

    return Worker(aside(warmed), waiting, stall)
