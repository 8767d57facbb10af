"""What can go wrong with a request: one exception per HTTP status, and the body that says so.

They travel between processes, so there is no web framework here: `error_responses` has that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

FailureReason = Literal[
    "step",
    "decode",
    "encode",
    "non_finite",
    "out_of_memory",
    "worker_died",
    "shutting_down",
    "internal",
]


@dataclass(frozen=True)
class Detail:
    """One field of a request that was refused."""

    field: str
    value: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.field} is {self.value}; allowed: {self.allowed}"


class ApiError(Exception):
    """Ends a request with `status` and a body that `error_body` makes."""

    status: ClassVar[int]
    type: ClassVar[str]
    reason: FailureReason = "internal"
    """What an accepted request that ends so is counted under, if that is a failure."""

    @property
    def headers(self) -> Mapping[str, str]:
        return {}

    @property
    def details(self) -> Sequence[Detail]:
        return ()

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process sends them; BaseException would call __init__ with the message.
        return _restore, (type(self), self.args, vars(self))


def _restore(kind: type[ApiError], args: tuple[object, ...], state: dict[str, object]) -> ApiError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class MalformedBodyError(ApiError):
    status, type = 400, "malformed_body"


class UnauthorizedError(ApiError):
    """`reason` never holds what was sent: it may be a key with a typo."""

    status, type = 401, "unauthorized"

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; send Authorization: Bearer KEY or X-API-Key: KEY")

    @property
    def headers(self) -> Mapping[str, str]:
        return {"www-authenticate": "Bearer"}


class NotFoundError(ApiError):
    status, type = 404, "not_found"


class BodyTooLargeError(ApiError):
    status, type = 413, "body_too_large"

    def __init__(self, size: str, limit: int) -> None:
        super().__init__(f"the body has {size} bytes; allowed: at most {limit}")

    @property
    def headers(self) -> Mapping[str, str]:
        return {"connection": "close"}


class MalformedRequestError(ApiError):
    """What comes is no HTTP; before the app, as the next three."""

    status, type = 400, "malformed_request"

    def __init__(self, reason: str) -> None:
        super().__init__(f"this is not HTTP/1.1: {reason}")


class HeadersTooLargeError(ApiError):
    status, type = 431, "headers_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the headers are too large; allowed: at most {limit} bytes")


class RequestTimeoutError(ApiError):
    """`part` is headers or body."""

    status, type = 408, "request_timeout"

    def __init__(self, part: str, limit_s: float) -> None:
        super().__init__(f"the {part} of the request took more than {limit_s:g} s")


class TooManyConnectionsError(ApiError):
    status, type = 429, "too_many_connections"

    def __init__(self, limit: int) -> None:
        super().__init__(f"all {limit} connections are in use; try again in 1 s")

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": "1"}


class MediaTypeError(ApiError):
    status, type = 415, "unsupported_media_type"


class InvalidRequestError(ApiError):
    status, type = 422, "invalid_request"

    def __init__(self, details: Sequence[Detail]) -> None:
        super().__init__("; ".join(map(str, details)))
        self._details = details

    @property
    def details(self) -> Sequence[Detail]:
        return self._details


class RetryLaterError(ApiError):
    """`retry_after_s` is what was computed. Clients are told whole seconds, up to half as many
    more at random, or those that are refused together would come back together."""

    status = 429

    def __init__(
        self, reason: str, retry_after_s: float, draw: Callable[[int], int] = random.randrange
    ) -> None:
        """`draw(n)` gives an integer from 0 to n − 1."""
        least_s = max(1, math.ceil(retry_after_s))
        self.retry_after_s = retry_after_s
        self.told_s = least_s + draw((least_s + 1) // 2 + 1)
        super().__init__(f"{reason}; try again in {self.told_s} s")

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": str(self.told_s)}


class QueueFullError(RetryLaterError):
    """`queued` and `limit` are in evaluations of the model for one row."""

    type = "queue_full"

    def __init__(self, retry_after_s: float, cost: float, queued: float, limit: float) -> None:
        self.queued, self.limit = queued, limit
        reason = (
            f"this request takes {cost:.0f} model evaluations, {queued:.0f} are queued and the "
            f"limit is {limit:.0f}"
        )
        super().__init__(reason, retry_after_s)


class RateLimitedError(RetryLaterError):
    """A client has used up its share; `rate` is in evaluations of the model a second."""

    type = "rate_limited"

    def __init__(self, retry_after_s: float, rate: float, burst_s: float) -> None:
        reason = (
            f"this client may use {rate:g} model evaluations a second, and {rate * burst_s:g} at "
            "once after a pause"
        )
        super().__init__(reason, retry_after_s)


class ClientGoneError(ApiError):
    """Nobody reads this answer; 499 is what proxies log for it."""

    status, type = 499, "client_gone"

    def __init__(self) -> None:
        super().__init__("the client disconnected")


class DeadlineError(ApiError):
    """`predicted_s` is None where the time had run out already."""

    status, type = 504, "deadline_exceeded"

    def __init__(self, deadline_s: float, predicted_s: float | None = None) -> None:
        self.deadline_s, self.predicted_s = deadline_s, predicted_s
        reason = (
            "has passed"
            if predicted_s is None
            else f"is too short: about {predicted_s:.2f} s are needed"
        )
        super().__init__(f"the deadline of {1000 * deadline_s:.0f} ms {reason}")

    @property
    def details(self) -> Sequence[Detail]:
        if self.predicted_s is None:
            return ()
        allowed = f"about {math.ceil(1000 * self.predicted_s)} or more now"
        return [Detail("deadline_ms", f"{1000 * self.deadline_s:.0f}", allowed)]


class EngineClosedError(ApiError):
    status, type = 503, "shutting_down"
    reason: FailureReason = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class NotReadyError(ApiError):
    """No worker is ready, for these reasons."""

    status, type = 503, "not_ready"

    def __init__(self, reasons: Sequence[str], retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"the server is not ready: {'; '.join(reasons)}")

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": str(math.ceil(self.retry_after_s))}


class WorkerDiedError(ApiError):
    """The worker of a request died, and it is not tried again."""

    status, type = 503, "worker_died"
    reason: FailureReason = "worker_died"

    def __init__(self, deaths: int) -> None:
        times = "once" if deaths == 1 else f"{deaths} times"
        super().__init__(f"a worker that had this request died, {times}; it is not tried again")


class RequestCancelledError(ApiError):
    status, type = 499, "cancelled"

    def __init__(self) -> None:
        super().__init__("the request was cancelled by DELETE /requests/{id}")


class GenerationError(ApiError):
    """The images of one accepted request could not be made; nobody else is touched."""

    status, type = 500, "generation_failed"

    def __init__(self, reason: FailureReason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def error_body(
    kind: str, message: str, request_id: str, details: Sequence[Detail] = ()
) -> dict[str, object]:
    """The JSON of every error, whoever finds it."""
    error = {"type": kind, "message": message, "details": [asdict(detail) for detail in details]}
    return {"error": error, "request_id": request_id}
