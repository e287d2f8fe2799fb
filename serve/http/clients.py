"""Clients that leave before they have their answer."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; None when the client of `receive`, whose body was read, left first: `work` is cancelled."""
    task, leave = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, leave), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leave.cancel()
        if not task.done():
            task.cancel()
    return task.result() if task.done() else None


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
