"""Whether a server wants to be called: what readiness probes hear."""

from collections.abc import Awaitable, Callable


class Readiness:
    """Ready, until told otherwise. Known to probes by the names of the server's services; liveness is not concerned."""

    def __init__(self) -> None:
        self.ready = True
        self._publish: Callable[[bool], Awaitable[None]] | None = None

    async def publish(self, publish: Callable[[bool], Awaitable[None]]) -> None:
        """From now on, and now, probes learn of it."""
        self._publish = publish
        await publish(self.ready)

    async def tell(self, ready: bool) -> None:  # noqa: FBT001 - its one argument
        """Its state now."""
        changed, self.ready = ready != self.ready, ready
        if changed and self._publish is not None:
            await self._publish(ready)
