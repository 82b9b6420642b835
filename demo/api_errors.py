"""What the API answers when it does not answer: errors in OpenAI's shape."""

from typing import Any

from starlette.responses import JSONResponse

from orthus.serving import PromptTooLong

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """Ends a request with `status` and `{"error": {"message", "type", "param", "code"}}`.

    The message is for the client and never holds what the client sent, but for names of fields.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


FIELDS = {
    "max_new_tokens": "max_tokens",
    "do_sample=False": "temperature 0",
    "=True": "=true",
    "=False": "=false",
    "=None": "=null",
}  # what Python calls things, and what a client of the API calls them


def refusal(error: Exception, code: str) -> RequestError:
    """A 400 for what the engine does not take, in the words of the API."""
    if isinstance(error, PromptTooLong):
        message = (
            f"the messages take {error.length} of the {error.limit} positions that the model has, and the answer does not fit"
        )
        message += " behind them; send fewer or shorter ones, or lower max_tokens or max_images"
        return RequestError(400, message, code="context_length_exceeded")
    message = f"{error}"
    for name, meant in FIELDS.items():
        message = message.replace(name, meant)
    return RequestError(400, message[:400], code=code)


class ClientGone(Exception):
    """Nobody waits for the response any more."""
