"""Steps of an event loop."""

import asyncio


async def turn() -> None:
    """Return once everything that was ready to run has run."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    loop.call_soon(done.set_result, None)
    await done
