"""How much one client may ask of the server itself: bytes and seconds of a body, seconds of not reading an answer."""

import asyncio
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request, hundreds of prompts of thousands of tokens. body_seconds: in which it must be there.

    send_seconds: after which a client that takes nothing of its answer has lost it. quiet_seconds: without a token
    after which a stream gets a comment, so that nothing on the way gives it up.
    """

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    quiet_seconds: float = 15.0


class Limit:
    """ASGI middleware for bodies. They are counted as they come, for a client need not tell beforehand."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limits, size, whole = self.limits, 0, False
        end = asyncio.get_running_loop().time() + limits.body_seconds

        async def counted() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {limits.body_seconds:g} seconds") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > limits.body_bytes:
                raise HTTPException(413, f"the body has more than the {limits.body_bytes} bytes that are allowed")
            return message

        await self.app(scope, counted, send)
