"""A request as the HTTP process knows it, whichever worker has it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rae.server import messages
from rae.server.request import ImageSpec, Priority


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request on its way through the workers. `deadline` is of the times that are given."""

    id: int
    request_id: str
    specs: list[ImageSpec]
    client: str = ""
    weight: float = 1.0
    priority: Priority = "normal"
    submitted_at: float = 0.0
    deadline: float = math.inf
    is_accepted: bool = False
    is_started: bool = False
    is_suspect: bool = False
    """Its worker died when it was running: it may have been the reason."""
    deaths: int = 0
    orphaned_at: float = 0.0

    def message(self, now: float) -> messages.Submit:
        return messages.Submit(
            ticket=self.id,
            request_id=self.request_id,
            specs=self.specs,
            client=self.client,
            weight=self.weight,
            priority=self.priority,
            deadline_s=self.deadline - now,
            bounded=not self.is_accepted,
        )
