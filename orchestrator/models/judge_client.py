"""An OpenAI-compatible chat endpoint: one question, one answer, with retries that listen to Retry-After."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from orchestrator import exits
from orchestrator.errors import CommandError

LONGEST_WAIT = 120.0
"""Seconds that a Retry-After may ask for; beyond that it is better to come back later."""


class JudgeError(CommandError):
    """The judge cannot be asked. What it has answered so far is kept, and the next call goes on from there."""

    code = "judge"


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is, and what it costs."""

    base_url: str
    """As in https://api.openai.com/v1; `/chat/completions` is appended."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; an endpoint that needs none is asked without."""
    usd_per_million_input: float | None = None
    usd_per_million_output: float | None = None
    temperature: float | None = None
    """None: the endpoint's own; some models accept no other."""
    concurrency: int = 4
    """Questions under way at once."""
    attempts: int = 6
    """Tries of one request that meets a busy or broken endpoint."""
    wait_seconds: float = 1.0
    """The first wait between them where the endpoint names none; it doubles, with jitter."""
    timeout_seconds: float = 120.0


@dataclass(frozen=True)
class Answer:
    """What came back; token counts are None where the endpoint does not tell."""

    content: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Busy(Exception):
    """Worth another try: 429, 5xx, or a body that is cut off. `wait` is what the endpoint asked for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def micro_usd(endpoint: Endpoint, prompt_tokens: int | None, completion_tokens: int | None) -> int | None:
    """The price of an answer in micro-dollars: dollars per million tokens are micro-dollars per token. None where a
    price or a count is unknown."""
    parts = (
        (prompt_tokens, endpoint.usd_per_million_input),
        (completion_tokens, endpoint.usd_per_million_output),
    )
    if any(count is None or price is None for count, price in parts):
        return None
    return round(sum((count or 0) * (price or 0.0) for count, price in parts))


class Client:
    """Asks one endpoint; threads may share it."""

    def __init__(self, endpoint: Endpoint) -> None:
        import httpx2

        parts = urlsplit(endpoint.base_url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise JudgeError(
                f"{endpoint.base_url!r} is no base URL", "write it as in https://api.openai.com/v1"
            )
        key = os.environ.get(endpoint.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._endpoint, self._keyed = endpoint, bool(key)
        self._http = httpx2.Client(
            headers=headers, timeout=httpx2.Timeout(endpoint.timeout_seconds, connect=10)
        )
        self._url = f"{endpoint.base_url.rstrip('/')}/chat/completions"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(self, messages: list[dict[str, str]]) -> Answer:
        """One answer. Raises JudgeError where the endpoint refuses, or stays busy for all attempts."""
        import httpx2

        from provisioning.retries import stamina

        def again(error: Exception) -> bool | float:
            if isinstance(error, Busy):
                return True if error.wait is None else error.wait
            return isinstance(error, httpx2.TransportError)

        end = self._endpoint
        retrying = stamina.retry(on=again, attempts=end.attempts, timeout=None, wait_initial=end.wait_seconds,
                                 wait_max=60.0, wait_jitter=end.wait_seconds)  # fmt: skip
        try:
            return retrying(self._once)(messages)
        except (Busy, httpx2.TransportError) as error:
            reason = str(error) or type(error).__name__
            raise JudgeError(f"{self._url} did not answer in {end.attempts} tries: {reason}",
                             "run the same command again later; what was answered is kept") from error  # fmt: skip

    def _once(self, messages: list[dict[str, str]]) -> Answer:
        body: dict[str, Any] = {"model": self._endpoint.model, "messages": messages}
        if self._endpoint.temperature is not None:
            body["temperature"] = self._endpoint.temperature
        reply = self._http.post(self._url, json=body)
        if reply.status_code == 429 or reply.status_code >= 500:
            wait = _retry_after(reply.headers.get("retry-after"))
            if wait is not None and wait > LONGEST_WAIT:
                raise JudgeError(
                    f"{self._url} asks to wait {wait:.0f} s (HTTP {reply.status_code})",
                    "run the same command again then",
                )
            raise Busy(f"HTTP {reply.status_code}", wait)
        if reply.status_code >= 400:
            raise self._refusal(reply.status_code, reply.text)
        return _answer(reply.text)

    def _refusal(self, status: int, text: str) -> JudgeError:
        said = _said(text)
        error = JudgeError(
            f"{self._url} refused (HTTP {status}){said}",
            f"check the model's name ({self._endpoint.model}) and the base URL",
        )
        if status in {401, 403}:
            error.exit_code = exits.CREDENTIALS
            name = self._endpoint.key_variable
            error.hint = (
                f"the key in {name} is not accepted"
                if self._keyed
                else f"set {name} to a key of this endpoint"
            )
        return error


def _answer(text: str) -> Answer:
    """The answer in a reply's body. Raises Busy where the body is cut off or has another shape."""
    try:
        raw = json.loads(text)
        content = raw["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Busy(f"the answer is no chat completion: {text[:80]!r}") from error
    usage = raw.get("usage") or {}
    return Answer(
        content if isinstance(content, str) else "",
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _said(text: str) -> str:
    """What an error's body says, in a clause."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    return f": {str(message)[:200]}"


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date (RFC 9110, 10.2.3)."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
