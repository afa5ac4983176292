"""Streaming chat requests, with errors that name the command to run next."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from tandem.errors import ClusterError, ConfigError, EngineError, TandemError, UnknownModelError, did_you_mean, sentence

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError

CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 600.0


@dataclass(kw_only=True)
class Answer:
    """One answer as it grows."""

    text: str = ""
    tokens: int = 0
    """As the server counts them; 0 if it does not say."""
    first_s: float | None = None
    """Seconds to the first word."""
    seconds: float = 0.0
    cut: bool = False
    """Whether it ended at its token limit."""


@dataclass(kw_only=True)
class Talker:
    """A client of one server. Every method raises a TandemError where the server does not answer as asked."""

    api_url: str
    api_key: str
    temperature: float | None = None
    max_tokens: int | None = None
    answer: Answer = field(default_factory=Answer)
    """The answer that `ask` is giving or gave last."""

    def __post_init__(self) -> None:
        # Imported here: a third of a second that `tandem --help` need not wait.
        from openai import OpenAI, Timeout

        timeout = Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._client: OpenAI = OpenAI(base_url=self.api_url, api_key=self.api_key, timeout=timeout, max_retries=1)

    def models(self) -> list[str]:
        """Names of what is served, as the server orders them."""
        with self._errors(""):
            return [model.id for model in self._client.models.list()]

    def ask(self, model: str, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """The pieces of a streamed answer. Closing the iterator closes the connection, which ends the generation."""
        self.answer = answer = Answer()
        limits: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        began = time.monotonic()
        with (
            self._errors(model),
            self._client.chat.completions.create(
                model=model,
                messages=cast(Any, messages),
                stream=True,
                stream_options={"include_usage": True},
                extra_body={name: value for name, value in limits.items() if value is not None},
            ) as stream,
        ):
            for chunk in stream:
                answer.seconds = time.monotonic() - began
                if chunk.usage:
                    answer.tokens = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    answer.cut = choice.finish_reason == "length"
                    if choice.delta.content:
                        answer.first_s = answer.seconds if answer.first_s is None else answer.first_s
                        answer.text += choice.delta.content
                        yield choice.delta.content

    @contextlib.contextmanager
    def _errors(self, model: str) -> Iterator[None]:
        from openai import OpenAIError

        try:
            yield
        except OpenAIError as error:
            raise self._explained(error, model) from error

    def _explained(self, error: OpenAIError, model: str) -> TandemError:
        import openai

        said = message_of(error)
        match error:
            case openai.APITimeoutError() if model and self.answer.text:
                return EngineError(f"The answer stopped for {ANSWER_TIMEOUT_S:.0f} s. `tandem serve status` says why.")
            case openai.APIConnectionError() if model and self.answer.text:
                return EngineError("The connection broke in the middle of the answer. `tandem serve status` says why.")
            case openai.APIConnectionError() if "CERTIFICATE_VERIFY_FAILED" in str(error.__cause__):
                return ClusterError(
                    f"The certificate of {self.api_url} is not trusted here. Set SSL_CERT_FILE to the file of the authority that "
                    "signed it, or of the certificate if it signed itself."
                )
            case openai.APIConnectionError():
                return ClusterError(
                    f"No server answers at {self.api_url}. Start one with `tandem serve up`, "
                    "or say where it is: --api-url or TANDEM_API_URL."
                )
            case openai.NotFoundError() if model and (served := self._served()) is not None:
                return unknown_model(model, served)
            case openai.NotFoundError():
                return ConfigError(
                    f"{self.api_url} is not OpenAI's API: it answered 404 ({said}) Its address usually ends with /v1: "
                    "--api-url http://HOST:PORT/v1."
                )
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return ConfigError(f"{self.api_url} refused the key: {said} Set it with --api-key or TANDEM_API_KEY.")
            case openai.APIStatusError(status_code=429 | 503):
                wait = error.response.headers.get("retry-after")
                when = f"in {wait} s" if wait else "in a moment"
                # The gateway says when; other servers may not.
                then = "" if "Try again" in said else f" Try again {when}."
                return EngineError(f"The server is busy ({error.status_code}): {said}{then}")
            case openai.APIStatusError():
                return EngineError(f"{self.api_url} answered {error.status_code}: {said}")
        return EngineError(f"The answer failed: {said}")

    def _served(self) -> list[str] | None:
        """Names of what is served; None where the server lists nothing."""
        try:
            return self.models()
        except TandemError:
            return None


def the_only(served: list[str]) -> str:
    """The model that is meant where none was named: there must be one only."""
    if not served:
        raise EngineError("The server serves no model. Train one, or start it with one: `tandem serve up`.")
    if len(served) > 1:
        raise ConfigError(f"{len(served)} models are served; choose one as the model (--model): {', '.join(served)}.")
    return served[0]


def unknown_model(model: str, served: list[str]) -> UnknownModelError:
    """The error for a model that is not among those served."""
    listed = ", ".join(served) or "nothing"
    return UnknownModelError(f"No model {model!r} is served.{did_you_mean(model, served)} Served: {listed}.")


def message_of(error: OpenAIError) -> str:
    """The server's own sentence, without the SDK's wrapping."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        inner = body.get("error")
        body = inner if isinstance(inner, dict) else body
        if message := body.get("message") or body.get("detail"):
            return sentence(" ".join(str(message).split()))
    return sentence(" ".join(str(error).split()))
