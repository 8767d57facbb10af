"""In which order requests are served: that in which they would end if they shared the device.

The fair sojourn protocol (Friedman and Henderson, SIGMETRICS 2003). A shadow system serves all
requests at once: clients share by weight, a client's requests equally. The real one serves them one
after the other, in the order in which they end in the shadow. On a device whose time is
proportional to the work, none then ends later than if they did share, and most much sooner: the
short pass the long, and the long are not passed for ever.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter

from rae.server.request import Priority, Request

Tag = tuple[float, int]
Flow = tuple[str, Priority]
SHARES: Mapping[Priority, float] = {"low": 0.1, "normal": 1.0, "high": 10.0}


def flow_of(request: Request) -> Flow:
    return request.client, request.priority


@dataclass(eq=False)
class _Client:
    """A client with requests in the shadow. A request ends there when `share`, the cost that each
    of them was served since the client came, has reached its tag; ties go by arrival."""

    weight: float
    tags: list[Tag] = field(default_factory=list)
    share: float = 0.0
    seen: float = 0.0
    """The shadow's time up to which `share` counts."""
    next_end: float = math.inf

    def update(self, now: float) -> None:
        if self.tags:
            self.share += (now - self.seen) * self.weight / len(self.tags)
        self.seen = now

    def plan_next_end(self) -> None:
        left = self.tags[0][0] - self.share if self.tags else math.inf
        self.next_end = self.seen + left * len(self.tags) / self.weight if self.tags else left


class FairOrder:
    """Requests in fair order. Costs are in any one unit; clients are told apart by name, and a
    client's weight is that of its latest request. Its requests of another priority are as if of
    another client, of `SHARES` times the weight: so even low ones are not passed for ever."""

    def __init__(self) -> None:
        self._now = 0.0  # cost served per unit of weight
        self._clients: dict[Flow, _Client] = {}  # those with requests in the shadow
        self._tags: dict[Request, Tag] = {}
        self._requests: dict[int, Request] = {}  # by arrival
        self._overdue: dict[Request, None] = {}  # ended in the shadow alone
        self._arrivals = count()

    def __iter__(self) -> Iterator[Request]:
        """From the first to the last; nothing may be changed meanwhile."""
        yield from self._overdue
        heads = [(c.next_end, c.tags[0][1], 0, c) for c in self._clients.values()]
        heapq.heapify(heads)
        while heads:
            end, arrival, index, client = heads[0]
            if arrival in self._requests:
                yield self._requests[arrival]
            if index + 1 == len(client.tags):
                heapq.heappop(heads)
                continue
            (tag, _), (next_tag, next_arrival) = client.tags[index : index + 2]
            end += (next_tag - tag) * (len(client.tags) - index - 1) / client.weight
            heapq.heapreplace(heads, (end, next_arrival, index + 1, client))

    def add(self, request: Request, cost: float) -> None:
        weight = request.weight * SHARES[request.priority]
        client = self._clients.setdefault(flow_of(request), _Client(weight))
        client.update(self._now)
        client.weight = weight
        arrival = next(self._arrivals)
        tag = self._tags[request] = (client.share + cost, arrival)
        self._requests[arrival] = request
        insort(client.tags, tag)
        client.plan_next_end()

    def remove(self, request: Request, unserved: float = 0.0) -> None:
        """A request is done, or gives up `unserved` of its cost.

        What it was served ahead of the others stays in the shadow until they had as much.
        """
        tag = self._tags.pop(request)
        del self._requests[tag[1]]
        if not self._tags:  # nothing is left in the shadow either, but for what sums drift
            self._clients.clear()
            self._overdue.clear()
        elif request in self._overdue:
            del self._overdue[request]
        else:
            client = self._clients[flow_of(request)]
            client.update(self._now)
            del client.tags[bisect_left(client.tags, tag)]
            if tag[0] - unserved > client.share:
                insort(client.tags, (tag[0] - unserved, tag[1]))
            self._settle(flow_of(request), client)

    def serve(self, cost: float) -> None:
        """Let the shadow work off `cost`."""
        while cost > 0 and self._clients:
            weights = sum(map(attrgetter("weight"), self._clients.values()))
            name, client = min(self._clients.items(), key=lambda item: item[1].next_end)
            if self._now + cost / weights < client.next_end:
                self._now += cost / weights
                return
            cost -= max(0.0, client.next_end - self._now) * weights
            self._now = client.seen = client.next_end
            client.share, arrival = client.tags.pop(0)
            if arrival in self._requests:
                self._overdue[self._requests[arrival]] = None
            self._settle(name, client)

    def _settle(self, name: Flow, client: _Client) -> None:
        client.plan_next_end()
        if not client.tags:
            del self._clients[name]
