"""Limits of the HTTP API."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Defaults are meant for a server that others reach. Sizes in bytes or pixels, times in seconds.

    Args:
        model_name: what `/v1/models` calls the checkpoint.
        token: what `Authorization: Bearer` must hold; None for everybody. `/health` never asks for it.
        max_body_bytes: of a whole request, counted while it is read.
        max_aspect: the longer side of an uploaded picture over the shorter one.
        max_messages, max_pictures, max_text: per request; text in characters, all messages together.
        max_n: answers per request; each is a job of its own and counts for the limit per user.
        max_diffusion_steps: that a request may ask for; all who draw at the same time wait for them.
        max_seconds: from the first byte of a request to its last answer, the queue included.
        body_seconds: in which the body must have arrived.
        send_seconds: which a client may keep a piece of the response waiting.
        allowed_hosts: accepted `Host` names; empty for all. For a server on the loopback interface its names, so that no web page
            reaches it through a name of its own.
    """

    model_name: str = "orthus"
    token: str | None = None
    max_body_bytes: int = 32_000_000
    max_image_bytes: int = 10_000_000
    max_pixels: int = 16_000_000
    max_aspect: int = 64
    max_messages: int = 64
    max_pictures: int = 8
    max_text: int = 20_000
    max_n: int = 4
    max_diffusion_steps: int = 100
    max_seconds: float = 600.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.token is not None and (len(self.token) < 8 or not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("token must be at least 8 printable ASCII characters, e.g. `openssl rand -hex 16`")
        for name in ("max_body_bytes", "max_image_bytes", "max_pixels", "max_messages", "max_text", "max_n",
                     "max_diffusion_steps", "max_seconds", "body_seconds", "send_seconds"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
