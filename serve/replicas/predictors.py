"""Models that predict, under Ray Serve: `PredictReplica` runs one, `RemotePredictor` is how a gateway asks them.

A prediction depends on nothing but its inputs, so one whose replica died is simply asked for again.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from models.model import Batch, Input
from serve.worker import Busy, Failed

PATIENCE_SECONDS = 60.0  # for a replica to come back
_ERRORS = {kind.__name__: kind for kind in (ValueError, Busy, Failed)}


@dataclass(frozen=True)
class Refusal:
    """An error as an answer: Ray would wrap it in its own, with a trace as its text."""

    kind: str
    text: str


@serve.deployment(max_ongoing_requests=1000, health_check_period_s=2, graceful_shutdown_timeout_s=10)
class PredictReplica:
    """source: folder or URI of the model. options: of `serve.predict.load`."""

    def __init__(self, source: str, options: dict[str, Any]) -> None:
        from serve import predict

        self.predictor = predict.load(source, **options)

    def check_health(self) -> None:
        self.predictor.check()

    async def about(self) -> tuple[dict[str, Input], int]:
        """What the model takes, and since when it is served."""
        return self.predictor.takes, self.predictor.created

    async def predict(self, inputs: Batch) -> Batch | Refusal:
        try:
            return await self.predictor.predict(inputs)
        except tuple(_ERRORS.values()) as error:
            kind = next(name for name, known in _ERRORS.items() if isinstance(error, known))
            return Refusal(kind, str(error))


class RemotePredictor:
    """`serve.predict.Predicts` over the replicas behind `handle`."""

    def __init__(self, handle: DeploymentHandle, takes: dict[str, Input], created: int) -> None:
        self.takes, self.created, self._handle = takes, created, handle

    @classmethod
    async def connect(cls, handle: DeploymentHandle) -> "RemotePredictor":
        """Waits for a replica."""
        return cls(handle, *await handle.about.remote())

    def check(self) -> None:
        """Ray Serve replaces replicas that fail; there is always one to wait for."""

    async def predict(self, inputs: Batch) -> Batch:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                answer = await self._handle.predict.remote(inputs)
            except BackPressureError as error:
                raise Busy("too many requests are waiting already, try again later") from error
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise Failed("no replica answers; try again later") from error
                await asyncio.sleep(0.2)
                continue
            if isinstance(answer, Refusal):
                raise _ERRORS[answer.kind](answer.text)
            return answer
