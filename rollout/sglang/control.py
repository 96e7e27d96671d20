"""One server's control endpoints over HTTP: the only place that knows their paths and answers."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.request
from typing import Any

# A process that ends closes its connections; a host that ends does not. With these its connections fail after about 20 s of silence.
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class ServerRefused(RuntimeError):
    """A server could not be reached, or answered a control request with an error. Names endpoint, path and reason.

    status: of the HTTP answer; None when there was none in time.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def control_key(*, api_key: str | None, admin_key: str | None) -> str | None:
    """The key of the endpoints that control a server: SGLang takes the api key there when no admin key is set."""
    return api_key if admin_key is None else admin_key


def call(endpoint: str, path: str, body: dict[str, Any] | None = None, *, key: str | None, timeout_s: float) -> Any:
    """POST `body` as JSON (GET when it is None) to one server; the decoded answer (text if it is not JSON).

    key: bearer token or None. Raises ServerRefused for a connection error, a timeout, an HTTP error, or an answer with success=false.
    """
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint + path, data, headers)
    try:
        # An empty proxy table: servers are reached directly, whatever http_proxy says.
        with urllib.request.build_opener(urllib.request.ProxyHandler({}), _KeepAlive).open(request, timeout=timeout_s) as response:
            text = response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        try:
            detail = error.read().decode(errors="replace")[:500]
        except (OSError, http.client.HTTPException) as broken:  # it ended in the middle of saying so
            detail = str(broken) or type(broken).__name__
        raise ServerRefused(f"{endpoint}{path}: HTTP {error.code}: {detail}", status=error.code) from error
    except (OSError, http.client.HTTPException) as error:  # the latter: a connection that ended in the middle of an answer
        raise ServerRefused(f"{endpoint}{path}: {str(error) or type(error).__name__}") from error
    try:
        answer = json.loads(text)
    except ValueError:
        return text
    if isinstance(answer, dict) and answer.get("success") is False:
        raise ServerRefused(f"{endpoint}{path}: {answer.get('message', 'success is false, without a message')}", status=200)
    return answer


def weight_version(endpoint: str, *, key: str | None, timeout_s: float) -> str:
    """The weight version a server reports (SGLang's word, a string). key: the api key, also where there is an admin key."""
    return call(endpoint, "/model_info", key=key, timeout_s=timeout_s)["weight_version"]


def check_engine(endpoint: str, *, key: str | None, timeout_s: float) -> None:
    """Raises ServerRefused unless the process that computes answers; /health and /model_info are answered without it. key: the api key."""
    call(endpoint, "/server_info", key=key, timeout_s=timeout_s)


def engine_version(endpoint: str, *, key: str | None, timeout_s: float) -> str | None:
    """The version of SGLang that a server reports, None where it reports none. key: the api key. Raises ServerRefused."""
    answer = call(endpoint, "/server_info", key=key, timeout_s=timeout_s)
    version = answer.get("version") if isinstance(answer, dict) else None
    return version if isinstance(version, str) else None


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        for option in KEEPALIVE:
            self.sock.setsockopt(*option)


class _KeepAlive(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)
