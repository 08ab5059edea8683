"""Lambda's public API, version 1: one HTTPS exchange at a time, and what its answers mean.

Reads are retried, a bounded number of times and with jitter. Launch and terminate never are: their outcome is known
(answered, or refused with a code of Lambda's), or it is Ambiguous. Only `error.code` is branched on; messages are shown.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import SecretStr, TypeAdapter, ValidationError

from provisioning import console_of
from provisioning.base import Ambiguous, CredentialsError, NoCapacity, ProviderError, Refused, Unavailable
from provisioning.ratelimit import Limiter

if TYPE_CHECKING:
    import httpx2

DEFAULT_BASE_URL = "https://cloud.lambda.ai/api/v1"
T = TypeVar("T")
CONSOLE = console_of("lambda")

ACCOUNT_CODES = {
    "global/invalid-api-key": "make a key at https://cloud.lambda.ai/api-keys and put it into LAMBDA_API_KEY",
    "global/account-inactive": "verify the e-mail address and the payment method of the Lambda account",
    "global/invalid-address": "give the Lambda account a valid billing address",
    "global/forbidden": "this key may not do that: check the workspace that it belongs to",
}
GONE_CODES = frozenset({"global/object-does-not-exist", "global/not-found"})
NO_CAPACITY = "instance-operations/launch/insufficient-capacity"
HINTS = {
    "global/quota-exceeded": "terminate something, or ask Lambda's support for a larger quota",
    "global/object-does-not-exist": "a name in hardware (ssh_key_name, filesystem, image) is not known in this region or workspace",
    "instance-operations/launch/file-system-in-wrong-region": "name the filesystem's region in hardware.regions",
}


@dataclass(frozen=True)
class Credentials:
    """An API key, and where it was found."""

    key: SecretStr
    source: str


@dataclass(frozen=True)
class Answer:
    """The body of a success, and the POSIX time at which its request was sent."""

    body: dict[str, Any]
    sent_at: float

    @property
    def data(self) -> object:
        """The payload."""
        return self.body["data"]

    def parsed(self, shape: TypeAdapter[T]) -> T:
        """The payload as `shape`. Raises Unavailable; pydantic's own message would quote the payload, secrets included."""
        try:
            return shape.validate_python(self.data)
        except ValidationError as error:
            where = ".".join(
                str(part) for part in error.errors(include_input=False, include_url=False)[0]["loc"]
            )
            raise Unavailable(
                f"Lambda's answer cannot be read ({error.error_count()} errors, the first at {where or 'its root'})",
                code="unreadable",
                hint="nothing was changed; if this stays so, the API has changed and llmctl needs an update",
            ) from None


class ApiError(Exception):
    """An exchange without a success: `status` is None without any answer, `code` None where no error code could be read."""

    def __init__(
        self,
        what: str,
        *,
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what)
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @property
    def unclear(self) -> bool:
        """The request may or may not have had its effect, and the same request may succeed a moment later."""
        if self.code is None or self.status is None:
            return True
        upstream = self.code.startswith("provider/") or self.code == "global/internal-error"
        return upstream or self.status >= 500 or self.status in (408, 429)


def find_credentials(
    environ: Mapping[str, str] = os.environ, user_home: Path | None = None
) -> Credentials | None:
    """The key in LAMBDA_API_KEY, else in the file that SkyPilot uses. Raises CredentialsError where it cannot be a key."""
    key, source = environ.get("LAMBDA_API_KEY", "").strip(), "LAMBDA_API_KEY"
    if not key:
        path = (user_home or Path.home()) / ".lambda_cloud" / "lambda_keys"
        source = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        found = re.search(r"^\s*api_key\s*=\s*(\S+)\s*$", text, re.MULTILINE)
        if found is None:
            return None
        key = found[1]
    if not key.isascii() or not key.isprintable() or " " in key:
        raise CredentialsError(
            f"what {source} holds cannot be an API key", code="no-key", hint="copy it again, without quotes"
        )
    return Credentials(SecretStr(key), source)


def base_url(environ: Mapping[str, str] = os.environ) -> str:
    """LAMBDA_API_BASE_URL or Lambda's own. Raises CredentialsError where the key would cross a network in the clear."""
    url = (environ.get("LAMBDA_API_BASE_URL") or DEFAULT_BASE_URL).rstrip("/")
    if not re.match(r"https://|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?(/|$)", url):
        raise CredentialsError(
            f"LAMBDA_API_BASE_URL is {url}: the API key would be sent in the clear",
            code="insecure-url",
            hint="use https; plain http is for this machine only",
        )
    return url


class LambdaApi:
    """The client. `credentials` may be missing: then each call raises CredentialsError."""

    def __init__(
        self,
        credentials: Credentials | None,
        url: str,
        limiter: Limiter,
        *,
        pace: float = 1.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.url = url
        self._credentials = credentials
        self._limiter = limiter
        self._pace = pace
        self._now = now

    @property
    def credentials(self) -> Credentials:
        """The key. Raises CredentialsError without one."""
        if self._credentials is None:
            raise CredentialsError(
                "there is no Lambda API key",
                code="no-key",
                hint="make one at https://cloud.lambda.ai/api-keys and put it into LAMBDA_API_KEY",
            )
        return self._credentials

    def read(
        self,
        method: str,
        path: str,
        *,
        json: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
    ) -> Answer:
        """An exchange that may be repeated: at most five times within a minute, because the limits are tight and an
        outage is better seen early. Raises Unavailable, CredentialsError; Refused only where something was to change."""
        try:
            return self._repeated(method, path, json, params)
        except ApiError as error:
            raise self._explained(error, method, path) from None

    def look_up(self, path: str) -> Answer | None:
        """One object; None where Lambda says that there is none."""
        try:
            return self._repeated("GET", path, None, None)
        except ApiError as error:
            if error.code in GONE_CODES:
                return None
            raise self._explained(error, "GET", path) from None

    def send(self, path: str, json: dict[str, Any], *, launch: bool = False, urgent: bool = False) -> Answer:
        """An effect, sent once. Raises Refused, NoCapacity, CredentialsError where Lambda said no; Ambiguous otherwise."""
        try:
            return self._exchange("POST", path, json, None, launch=launch, urgent=urgent)
        except Unavailable as error:  # no turn to send anything
            raise Ambiguous(str(error), code=error.code, hint=error.hint) from None
        except ApiError as error:
            if error.unclear:
                raise Ambiguous(
                    f"POST {path}: {error}; whether it had an effect is not known",
                    code=error.code or _transport_code(error),
                    hint="the instance list decides; see also " + CONSOLE,
                ) from None
            raise self._explained(error, "POST", path) from None

    def _repeated(
        self, method: str, path: str, json: dict[str, Any] | None, params: dict[str, str] | None
    ) -> Answer:
        from provisioning.retries import stamina

        def again(error: Exception) -> bool | float:
            if not isinstance(error, ApiError) or not error.unclear:
                return False
            return True if error.retry_after is None else error.retry_after

        pace = self._pace
        for attempt in stamina.retry_context(
            on=again,
            attempts=5,
            timeout=60.0,
            wait_initial=1.0 * pace,
            wait_max=15.0 * pace,
            wait_jitter=1.0 * pace,
        ):
            with attempt:
                return self._exchange(method, path, json, params)
        raise AssertionError("stamina ends with an answer or an error")

    def _exchange(
        self,
        method: str,
        path: str,
        json: dict[str, Any] | None,
        params: dict[str, str] | None,
        *,
        launch: bool = False,
        urgent: bool = False,
    ) -> Answer:
        import httpx2

        client = self._client
        self._limiter.wait(launch=launch, urgent=urgent)
        sent_at = self._now()
        timeout = httpx2.Timeout(60.0 if method == "POST" else 30.0, connect=10.0)
        try:
            response = client.request(method, self.url + path, json=json, params=params, timeout=timeout)
        except httpx2.HTTPError as error:
            raise ApiError(f"no answer ({type(error).__name__})") from None
        except httpx2.InvalidURL:
            raise CredentialsError(
                f"LAMBDA_API_BASE_URL is no URL: {self.url}", code="insecure-url"
            ) from None
        finally:
            self._limiter.done(launch=launch)
        return Answer(self._body(response.status_code, response.headers, response.content), sent_at)

    @cached_property
    def _client(self) -> httpx2.Client:
        import httpx2

        headers = {
            "Authorization": f"Bearer {self.credentials.key.get_secret_value()}",
            "Accept": "application/json",
            "User-Agent": "llmctl",
        }
        # A connection of its own for each exchange: a pooled one that the server has closed meanwhile would make a
        # launch ambiguous for nothing.
        return httpx2.Client(headers=headers, limits=httpx2.Limits(max_keepalive_connections=0))

    def _body(self, status: int, headers: Mapping[str, str], content: bytes) -> dict[str, Any]:
        import json

        try:
            body = json.loads(content)
        except ValueError:
            body = None
        if status == 200 and isinstance(body, dict) and "data" in body:
            return body
        retry_after = _retry_after(headers.get("Retry-After"), self._now())
        if status == 429:
            self._limiter.back_off(retry_after if retry_after is not None else 5.0 * self._pace)
        error = body.get("error") if isinstance(body, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        if not isinstance(error, dict) or not isinstance(code, str):
            what = f"HTTP {status} with a body that is not what the API describes"
            raise ApiError(what, status=status, retry_after=retry_after)
        what = f"{_scrubbed(code, self.credentials)}: {_scrubbed(str(error.get('message', '')), self.credentials)}"
        raise ApiError(what, status=status, code=code, retry_after=retry_after)

    def _explained(self, error: ApiError, method: str, path: str) -> ProviderError:
        message = f"Lambda: {method} {path}: {error}"
        if error.code in ACCOUNT_CODES:
            return CredentialsError(message, code=error.code, hint=ACCOUNT_CODES[error.code])
        if error.unclear:
            hint = "nothing was changed; try again in a minute, or look at https://status.lambda.ai"
            return Unavailable(message, code=error.code or _transport_code(error), hint=hint)
        code = cast("str", error.code)
        if code == NO_CAPACITY:
            return NoCapacity(
                message, code=code, hint="another region or type may have some; or `llmctl launch --wait 6h`"
            )
        kind = Unavailable if method == "GET" else Refused
        return kind(message, code=code, hint=HINTS.get(code, ""))


def _transport_code(error: ApiError) -> str:
    return "no-answer" if error.status is None else f"http-{error.status}"


def _retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for (a number, or a date), at most a minute; None without one."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (
                parsedate_to_datetime(value).astimezone(UTC) - datetime.fromtimestamp(now, UTC)
            ).total_seconds()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else None


_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)


def _scrubbed(text: str, credentials: Credentials) -> str:
    """A server's words for a terminal: no control characters, no secret that it repeats from the request, 300 characters."""
    text = text.replace(credentials.key.get_secret_value(), "[key]")
    text = _PRIVATE_KEY.sub("[private key]", text)
    text = re.sub(r"#cloud-config.*", "[user data]", text, flags=re.DOTALL)
    return "".join(character for character in text if character.isprintable())[:300]


SECRET_FIELDS = frozenset({"user_data", "private_key", "jupyter_token", "jupyter_url", "Authorization"})


def redacted(body: dict[str, Any]) -> dict[str, Any]:
    """A request or an answer without its secrets."""
    return {
        name: f"[redacted, {len(str(value))} characters]" if name in SECRET_FIELDS
        else redacted(value) if isinstance(value, dict)
        else [redacted(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list)
        else value
        for name, value in body.items()
    }  # fmt: skip
