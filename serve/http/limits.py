"""How much one client may ask of the server itself: bytes and seconds of a body, seconds of not reading an answer."""

import asyncio
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request; predict_bytes: of one to /predict, whose inputs may be images. body_values: commas in
    one, of which reading makes values, each of them slower than any byte. body_seconds: in which it must be there.
    answer_seconds: after which a completion is cut off, its reason is deadline; None: never.
    send_seconds: after which a client that takes nothing of its answer has lost it. quiet_seconds: without a token
    after which a stream gets a comment, so that nothing on the way gives it up.
    """

    body_bytes: int = 2**20
    predict_bytes: int = 16 * 2**20
    body_values: int = 2**17
    body_seconds: float = 30.0
    answer_seconds: float | None = 3600.0
    send_seconds: float = 60.0
    quiet_seconds: float = 15.0


class Limit:
    """ASGI middleware for bodies. They are counted as they come, for a client need not tell beforehand."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limits, size, values, whole = self.limits, 0, 0, False
        predicts = scope["path"].startswith("/predict/")
        most = limits.predict_bytes if predicts else limits.body_bytes
        end = asyncio.get_running_loop().time() + limits.body_seconds

        async def counted() -> Message:
            nonlocal size, values, whole
            if whole:  # what comes now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {limits.body_seconds:g} seconds") from None
            body = message.get("body", b"")
            size += len(body)
            values += body.count(b",")
            whole = not message.get("more_body", False)
            if size > most:
                raise HTTPException(413, f"the body has more than the {most} bytes that are allowed")
            if values > limits.body_values and not predicts:
                raise HTTPException(413, f"the body has more than the {limits.body_values} values that are allowed")
            return message

        await self.app(scope, counted, send)
