"""What stands before every request of the page: whose it is, how large it is, and what browsers may do with the answer.

A page that listens on one machine can still be reached by what other sites run in the same browser. So a request must
name this machine (against DNS rebinding), come from the page itself, and hold JSON, which other sites may not send.
"""

import ipaddress
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 40_000_000
"""Bytes of a request's body: an image of 30 MB in base64."""
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NAMES = ("localhost", socket.gethostname().lower(), socket.getfqdn().lower())


class TooLargeBodyError(Exception):
    """The body of a request has more than MOST_BYTES bytes."""


def is_own_host(host: str) -> bool:
    """Whether a Host header names this machine or an address: no other site's name can lead here then."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in NAMES
    return True


def refusal(method: str, headers: Headers) -> tuple[int, str] | None:
    """Return status and sentence for a request that is not answered; None for one that is."""
    host = headers.get("host", "")
    if not is_own_host(host):
        return 421, "This page answers under the address of this machine alone, not under the name in the request."
    origin = headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != host.lower():
        return 403, "The request comes from another site."
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return 403, "The request comes from another site."
    if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return 415, "A search is sent as JSON."
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MOST_BYTES:
        return 413, f"The image is too large: a request may have {MOST_BYTES // 1_000_000} MB."
    return None


class Guard:
    """Refuses requests as `refusal` says, bounds their bodies, and adds SECURITY_HEADERS to all answers."""

    def __init__(self, app: ASGIApp) -> None:
        """Stand before an application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = refusal(scope["method"], Headers(scope=scope))
        if refused:
            status, sentence = refused
            await JSONResponse({"error": sentence}, status)(scope, receive, with_headers(send))
            return
        await self.app(scope, bounded(receive), with_headers(send))


def with_headers(send: Send) -> Callable[[Message], object]:
    """Send with SECURITY_HEADERS."""

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers[name] = value
        await send(message)

    return send_with


def bounded(receive: Receive) -> Receive:
    """Receive a body whose length was not given, up to MOST_BYTES."""
    received = 0

    async def receive_bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MOST_BYTES:
            raise TooLargeBodyError
        return message

    return receive_bounded
