"""What the engine refuses, and the HTTP status each refusal travels as.

    EngineError                 500  a defect of ours
    +-- InvalidRequest          400  the body cannot be served as it stands; names field, value and remedy
    +-- UpdateRefused           400  a weight update or memory call was refused; weights are as they were
    +-- NotSupported            404  this dialect has no such endpoint
    +-- Forbidden               401  an admin route was called without its key
    +-- Unavailable             503  the engine cannot serve now (weights released, scheduler gone)

Nothing here is retried by the engine; the caller decides.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """Root of everything the engine reports to its caller."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "InternalServerError"


class InvalidRequest(EngineError, ValueError):
    """The request is malformed or asks for what this model cannot do. Not retryable."""

    status = 400
    kind = "BadRequestError"


class UpdateRefused(EngineError):
    """A weight or memory operation was refused, with the model's weights unchanged."""

    status = 400
    kind = "BadRequestError"


class NotSupported(EngineError):
    """The imitated release has no such endpoint."""

    status = 404
    kind = "NotFoundError"


class Forbidden(EngineError):
    """An admin route was called without the admin key."""

    status = 401
    kind = "AuthenticationError"


class Unavailable(EngineError):
    """The engine is up but cannot serve: its scheduler died, or its weights are released. Retry elsewhere."""

    status = 503
    kind = "ServiceUnavailableError"
