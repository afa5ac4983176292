"""Client for many prompts at once over HTTP, with the calling form of vLLM's `LLM`.

`tandem.LLM` adds to `RemoteLLM` that it serves the model itself where nobody does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tandem.errors import ClusterError, ConfigError, PromptError, TandemError, UnknownModelError
from tandem.settings import settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

T = TypeVar("T")
Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or vLLM's {"prompt": ...} or {"prompt_token_ids": ...}."""
Chat = Sequence[Mapping[str, Any]]
"""Messages: {"role": ..., "content": ...}."""

RETRIES = 8
"""How often one prompt is sent again while an engine is replaced; the server says how long to wait."""
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 600.0
CHECK_TIMEOUT_S = 10.0
"""How long a server may take to say whether it serves a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen, by vLLM's names and with its values where nothing is said."""

    n: int = 1
    """Answers to each prompt."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    max_tokens: int | None = 16
    """None: as many as the model has room for."""
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    """How many likeliest tokens to tell at each place."""
    skip_special_tokens: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else vLLM's server takes: structured_outputs, logit_bias, ..."""

    def wire(self) -> dict[str, Any]:
        """The keys of a request."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "seed", "logprobs")}
        said |= {name: value for name in ("seed", "logprobs") if (value := getattr(self, name)) is not None}
        return {**said, "stop": self.stop if isinstance(self.stop, str) else list(self.stop), **self.extra}


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One answer."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    """`stop`, or `length` if it was cut off at `max_tokens`."""
    stop_reason: str | int | None = None
    """The text or token of `stop` that ended it."""
    logprobs: Any = None
    """As the API has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A prompt and its answers; `output["text"]` is its first answer's text, as in Nano-vLLM."""

    request_id: str
    prompt: str | None
    """None if it was given as tokens or as a chat."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids"):
            raise KeyError(key)
        return getattr(self.outputs[0], key)


class RemoteLLM:
    """A model that is served somewhere."""

    def __init__(self, model: str, base_url: str, *, api_key: str | None = None, max_concurrency: int = 64) -> None:
        """`base_url`: of the gateway, with or without `/v1`; `max_concurrency`: requests that are open at once."""
        if max_concurrency < 1:
            raise ConfigError(f"max_concurrency is {max_concurrency}; it must be 1 or more.")
        root = base_url.rstrip("/")
        self.model = model
        self.base_url = root if root.endswith("/v1") else f"{root}/v1"
        self._api_key = api_key or settings().sent_key
        self._max_concurrency = max_concurrency

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The answers, in the order of the prompts; one SamplingParams for all or one for each.

        `use_tqdm` (vLLM's name) shows a progress bar. Raises PromptError with the place of the first prompt that failed.
        """
        listed = cast(list[Prompt], [prompts] if _is_one(prompts) else list(prompts))
        texts = [_text(prompt, index) for index, prompt in enumerate(listed)]

        async def ask(client: AsyncOpenAI, index: int, params: SamplingParams) -> RequestOutput:
            body = {**params.wire(), "return_token_ids": True}
            answer = await client.completions.create(model=self.model, prompt=texts[index], extra_body=body)
            return _output(answer, texts[index], lambda choice: choice.text)

        return self._run(ask, len(texts), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The same for one chat or for several, through the model's chat template."""
        chats: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)

        async def ask(client: AsyncOpenAI, index: int, params: SamplingParams) -> RequestOutput:
            body = {**params.wire(), "return_token_ids": True}
            if params.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": params.logprobs}
            answer = await client.chat.completions.create(model=self.model, messages=chats[index], extra_body=body)
            return _output(answer, None, lambda choice: choice.message.content or "")

        return self._run(ask, len(chats), sampling_params, use_tqdm)

    def check_served(self) -> None:
        """Ask the server for the model; UnknownModelError with the nearest name if it serves none of that name.

        Whatever else is wrong (no server, a key that it refuses) is told by the first prompt.
        """
        import openai

        try:
            with openai.OpenAI(
                base_url=self.base_url, api_key=self._api_key, timeout=CHECK_TIMEOUT_S, max_retries=0
            ) as client:
                client.models.retrieve(self.model)
        except openai.NotFoundError as error:
            body = getattr(error, "body", None)
            said = body.get("message") if isinstance(body, Mapping) else None
            # A 404 that is not in the API's own form may come of a server without that route.
            if said:
                raise UnknownModelError(f"{self.base_url}: {said}") from error
        except openai.OpenAIError:
            pass

    def _run(
        self,
        ask: Callable[[AsyncOpenAI, int, SamplingParams], Awaitable[RequestOutput]],
        count: int,
        params: SamplingParams | Sequence[SamplingParams] | None,
        show: bool,
    ) -> list[RequestOutput]:
        each = [params or SamplingParams()] * count if params is None or isinstance(params, SamplingParams) else params
        if len(each) != count:
            raise ConfigError(f"There are {count} prompts and {len(each)} sampling_params. Give one, or one for each.")
        return _in_a_loop(self._all(ask, each, show))

    async def _all(
        self,
        ask: Callable[[AsyncOpenAI, int, SamplingParams], Awaitable[RequestOutput]],
        params: Sequence[SamplingParams],
        show: bool,
    ) -> list[RequestOutput]:
        # Imported here: half a second that `import tandem` need not wait.
        from openai import AsyncOpenAI, OpenAIError, Timeout

        timeout = Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        done: dict[int, RequestOutput] = {}
        places: Iterator[int] = iter(range(len(params)))

        async def work(client: AsyncOpenAI, tell: Callable[[RequestOutput], None]) -> None:
            for index in places:
                try:
                    done[index] = await ask(client, index, params[index])
                except OpenAIError as error:
                    raise self._explained(error, index, len(params)) from error
                tell(done[index])

        async with AsyncOpenAI(
            base_url=self.base_url, api_key=self._api_key, timeout=timeout, max_retries=RETRIES
        ) as client:
            with _Bar(len(params), show) as bar:
                workers = [
                    asyncio.create_task(work(client, bar.tell)) for _ in range(min(self._max_concurrency, len(params)))
                ]
                try:
                    await asyncio.gather(*workers)
                finally:
                    # One prompt failed, or the caller has had enough: what is still open ends in the engines too.
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
        return [done[index] for index in range(len(params))]

    def _explained(self, error: OpenAIError, index: int, count: int) -> TandemError:
        import openai

        if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
            return ClusterError(
                f"No server answers at {self.base_url} (prompt {index} of {count}). Start one with `tandem serve up`, or "
                "leave base_url out: the model is then served on this machine."
            )
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, Mapping) else None
        return PromptError(f"Prompt {index} of {count} failed: {said or error}", index=index)


class _Bar:
    """Prompts done, tokens a second, time left; nothing with `show` off."""

    def __init__(self, count: int, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("Generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not show)
        self._task = self._progress.add_task("", total=count, tokens=0, pace="")
        self._tokens = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def tell(self, output: RequestOutput) -> None:
        """One more prompt is answered."""
        self._tokens += sum(len(answer.token_ids) for answer in output.outputs)
        seconds = self._progress.tasks[0].elapsed or 0.0
        pace = f"{self._tokens / seconds:,.0f}/s" if seconds else ""
        self._progress.update(self._task, advance=1, tokens=self._tokens, pace=pace)


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str | Mapping) or bool(prompts and isinstance(prompts[0], int))


def _text(prompt: Prompt, index: int) -> Any:
    if isinstance(prompt, Mapping):
        known = [key for key in ("prompt", "prompt_token_ids") if prompt.get(key) is not None]
        if not known:
            raise PromptError(
                f"Prompt {index} has neither `prompt` nor `prompt_token_ids`; it has {', '.join(prompt) or 'nothing'}.",
                index=index,
            )
        prompt = prompt[known[0]]
    return prompt if isinstance(prompt, str) else [int(token) for token in prompt]


def _output(answer: Any, prompt: Any, text: Callable[[Any], str]) -> RequestOutput:
    # Of completions a choice tells the prompt's tokens, of chats the answer does.
    tokens = getattr(answer, "prompt_token_ids", None) or getattr(answer.choices[0], "prompt_token_ids", None)
    return RequestOutput(
        request_id=answer.id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=list(tokens or ()),
        outputs=[
            CompletionOutput(
                index=choice.index,
                text=text(choice),
                token_ids=list(getattr(choice, "token_ids", None) or ()),
                finish_reason=choice.finish_reason,
                stop_reason=getattr(choice, "stop_reason", None),
                logprobs=choice.logprobs,
            )
            for choice in answer.choices
        ],
    )


def _in_a_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end: here, or in a thread where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
