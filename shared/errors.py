"""Every error Rejoin raises on purpose, split by whose fault it is. Knows nothing of HTTP or Redis.

    RejoinError
    ├── CallerError             the request is wrong; nothing was done
    │   ├── BadRequest          it cannot be understood
    │   ├── Unauthorized        no key, or not a key we know
    │   ├── Forbidden           this caller may never do that here
    │   ├── NotFound            no such thing, or not yours
    │   ├── Conflict            it contradicts what was done before
    │   ├── Gone                it was here and is no more
    │   ├── TooLarge            more bytes than we take
    │   ├── Unprocessable       understood, but a value is wrong
    │   └── TooMany             later, please
    ├── UpstreamError           the model's server failed; becomes `generation.failed`
    └── OurError                Rejoin or its Redis failed
        ├── Unavailable         try again soon
        └── SettingsError       the deployment is wrong; the start stops

`code` is stable and machine-readable, `message` says what happened, to which one, and what to do.
No message ever carries a prompt, an answer or a key.
"""


class RejoinError(Exception):
    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code


class CallerError(RejoinError):
    """The request is wrong. `param` names the field, where one is to blame."""

    code = "bad_request"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param


class BadRequest(CallerError):
    code = "bad_request"


class Unauthorized(CallerError):
    code = "unauthorized"


class Forbidden(CallerError):
    code = "forbidden"


class NotFound(CallerError):
    code = "not_found"


class Conflict(CallerError):
    code = "conflict"


class Gone(CallerError):
    """`outcome` is how the generation ended before its log was removed."""

    code = "gone"

    def __init__(self, message: str, *, outcome: str, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.outcome = outcome


class TooLarge(CallerError):
    code = "too_large"


class Unprocessable(CallerError):
    code = "invalid_value"


class TooMany(CallerError):
    code = "too_many"


class UpstreamError(RejoinError):
    """The model's server failed. `retryable` tells a client whether the same prompt may work later;
    `retry_after` is what the upstream asked for, in seconds."""

    code = "upstream_error"

    def __init__(
        self, message: str, *, code: str | None = None, retryable: bool = True, retry_after: float | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.retryable = retryable
        self.retry_after = retry_after


class OurError(RejoinError):
    code = "internal_error"


class Unavailable(OurError):
    """`retry_after` in seconds."""

    code = "unavailable"

    def __init__(self, message: str, *, code: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class SettingsError(OurError):
    code = "settings_error"
