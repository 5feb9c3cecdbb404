"""The versions of a fleet: the wanted one is prepared once, beside serving, and freed after its last use.

    want ─▶ prepare: the first transport that can ─▶ offer ─▶ every server loads the newest offer in its turn
                                                       │
                     release ◀─ no server has it, or could go back to it

A version that has been prepared is offered also if a newer one is wanted by then: otherwise, if versions came faster
than they can be prepared, none would ever be offered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sgpo_async.engines.base import Weights
from sgpo_async.engines.sglang.weight_sync.transports import Prepared, Transport
from sgpo_async.errors import EngineError, SessionError, Superseded, WeightsError


@dataclass(frozen=True, eq=False)
class Offer:
    """A version, and the transport that has prepared it."""

    weights: Weights
    transport: Transport
    prepared: Prepared


class Versions:
    """All calls come from one asyncio loop; transports prepare and release in threads.

    `needed` returns the offers that servers have or load; `say` takes what a user should know, one line each. A version
    that no transport could prepare is tried again after `retry_s`.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        needed: Callable[[], Iterable[Offer]],
        say: Callable[[str], None],
        retry_s: float,
    ) -> None:
        """`transports` are in the order in which they are tried."""
        self.offer: Offer | None = None  # the newest version that is prepared
        self.changed = asyncio.Event()  # set when there is another offer, then replaced by a new event
        self.transports = transports
        self._needed, self._say, self._retry_s = needed, say, retry_s
        self._wanted: Weights | None = None
        self._session = 0
        self._announced = asyncio.Event()
        self._preparing: dict[tuple[int, str], asyncio.Task[Offer]] = {}  # by the weights' identity and transport
        self._made: list[Offer] = []
        self._releasing: set[asyncio.Task[None]] = set()

    def want(self, weights: Weights | None) -> None:
        """Set the version that every server shall load; None withdraws the present offer."""
        self._wanted = weights
        if weights is None:
            self._session += 1
            self._set_offer(None)
        self._announced.set()

    async def run(self) -> None:
        """Prepare each wanted version, until this is cancelled."""
        while True:
            self._announced.clear()
            pause_s = None
            if (weights := self._wanted) is not None:
                session = self._session
                offer, again = await self._first_offer(weights)
                if session != self._session:
                    self.release()
                elif offer is not None:
                    self._set_offer(offer)
                pause_s = self._retry_s if again else None
            try:
                async with asyncio.timeout(pause_s):
                    await self._announced.wait()
            except TimeoutError:
                continue

    async def prepare(self, weights: Weights, transport: Transport) -> Offer:
        """The offer of one transport, which prepares a version once for all servers. Raises what it raises.

        It is released if nobody needs it when the caller next waits.
        """
        key = (id(weights), transport.name)
        if key not in self._preparing:
            self._preparing[key] = asyncio.create_task(self._prepare(weights, transport))
        offer = await asyncio.shield(self._preparing[key])
        if offer not in self._made:
            self._made.append(offer)
        return offer

    def release(self) -> None:
        """Free every version that is not offered and that no server needs."""
        kept = {self.offer, *self._needed()}
        for offer in [offer for offer in self._made if offer not in kept]:
            self._made.remove(offer)
            self._preparing.pop((id(offer.weights), offer.transport.name), None)
            task = asyncio.create_task(asyncio.to_thread(offer.transport.release, offer.prepared))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _first_offer(self, weights: Weights) -> tuple[Offer | None, bool]:
        """The offer of the first transport that can prepare the version; if there is none, whether to try again."""
        errors: list[str] = []
        for transport in self.transports:
            try:
                return await self.prepare(weights, transport), False
            except Superseded:  # a newer version has been announced
                return None, False
            except WeightsError as error:
                self._say(f"version {weights.version} is not loaded: {error}")
                return None, False
            except (EngineError, SessionError) as error:
                errors.append(f"by {transport.name}: {error}")
                if transport is not self.transports[-1]:
                    self._say(f"version {weights.version} {errors[-1]}; another transport is tried")
        found = "; ".join(errors)
        self._say(f"version {weights.version} is not loaded, next try in {self._retry_s:g} s: {found}")
        return None, True

    async def _prepare(self, weights: Weights, transport: Transport) -> Offer:
        """Raises what `Transport.prepare` raises; EngineError if the memory does not suffice."""
        prepared: Prepared | None = None
        try:
            prepared = await asyncio.to_thread(transport.prepare, weights)
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            raise EngineError(
                "not enough memory to prepare the weights; free some, or use another engine.sglang.transport"
            ) from None
        finally:
            if prepared is None:
                self._preparing.pop((id(weights), transport.name), None)
        return Offer(weights, transport, prepared)

    def _set_offer(self, offer: Offer | None) -> None:
        self.offer = offer
        self.changed.set()
        self.changed = asyncio.Event()
        self.release()


def _lacks_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch reports that by a RuntimeError with a text."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text
