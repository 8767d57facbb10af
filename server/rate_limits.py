"""How much a client may ask for: a token bucket that may go into debt. No clock, no HTTP.

What a request costs is known once it was accepted, so it is let in while the balance is above 0
and pays afterwards; a large one leaves a debt, which time pays off.
"""

from __future__ import annotations

from heapq import nlargest
from operator import itemgetter

from rae.server.errors import RateLimitedError

MAX_CLIENTS = 10_000


class RateLimits:
    """`rate` is in evaluations of the model a second, for each client, None for no limit; `burst_s`
    is how many seconds' worth a client that paused may use at once. `now` is in seconds of any
    clock that never goes back.

    In any window a client is charged at most rate · (burst_s + window) and the cost of those of its
    requests that were checked and not yet charged at one time: one, if they come one by one.
    """

    def __init__(
        self, rate: float | None, burst_s: float, *, max_clients: int = MAX_CLIENTS
    ) -> None:
        self.rate, self.burst_s, self.max_clients = rate, burst_s, max_clients
        # When each client's bucket is full again: who is not here has a full one.
        self._full_at: dict[str, float] = {}

    def check(self, client: str, now: float) -> None:
        """Raises RateLimitedError."""
        wait_s = self._full_at.get(client, now) - now - self.burst_s
        if self.rate is not None and wait_s >= 0:
            raise RateLimitedError(wait_s, self.rate, self.burst_s)

    def charge(self, client: str, cost: float, now: float) -> None:
        """`cost` of a request that was let in, in evaluations of the model."""
        if self.rate is None:
            return
        self._full_at[client] = max(self._full_at.get(client, now), now) + cost / self.rate
        if len(self._full_at) > self.max_clients:
            self._forget(now)

    def _forget(self, now: float) -> None:
        """Who has a full bucket; and whoever has the least to wait for it where that is still more
        than half of the clients that are kept, so that this is seldom done."""
        kept = [(client, at) for client, at in self._full_at.items() if at > now]
        self._full_at = dict(nlargest(self.max_clients // 2, kept, key=itemgetter(1)))
