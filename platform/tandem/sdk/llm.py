"""Offline generation: `tandem.LLM`, on a running server or on engines of its own.

llm = tandem.LLM("my-model")
for output in llm.generate(["import os", "def main("], tandem.SamplingParams(max_tokens=32)):
    print(output.prompt, output.outputs[0].text)
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Self

from tandem.errors import ConfigError, did_you_mean
from tandem.sdk.client import RemoteLLM

OWN_CUTOFF = 0.8
"""Similarity, 0 to 1, from which a name is taken for a misspelt one: vLLM has `max_model_len` and others of its own."""
OWN_ARGUMENTS = ("model", "base_url", "api_key", "max_concurrency", "replicas", "gpus_per_replica")


class LLM(RemoteLLM):
    """A model to generate with; `close`, the end of a `with` block or of the program stops what it started."""

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        max_concurrency: int = 64,
        replicas: int = 1,
        gpus_per_replica: float = 0.0,
        **engine_args: Any,
    ) -> None:
        """`model`: a registered model or adapter, a model of the Hugging Face hub (`org/name`, `org/name@revision`), or a folder.

        With `base_url`, a server that is up is asked. Without, the app of RAY_ADDRESS's cluster or of this home is; if there
        is none, the model is served for as long as this object lives: on `replicas` engines, with vLLM's own `engine_args`
        (`max_model_len`, `enforce_eager`, `tensor_parallel_size`, ...).

        Raises UnknownModelError with the nearest name if nobody serves or knows the model.
        """
        _check_arguments(engine_args)
        self._stop: weakref.finalize[Any, Any] | None = None
        name = model
        if base_url is None:
            base_url, name = self._serve(model, replicas, gpus_per_replica, engine_args)
        elif engine_args or replicas != 1 or gpus_per_replica:
            given = ", ".join(engine_args) or "replicas and gpus_per_replica"
            raise ConfigError(
                f"{base_url} is up with settings of its own; {given} cannot change them. Leave base_url or them out."
            )
        super().__init__(name, base_url, api_key=api_key, max_concurrency=max_concurrency)
        if self._stop is None:
            self.check_served()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving, if it was started here."""
        if self._stop is not None:
            self._stop()

    def _serve(
        self, model: str, replicas: int, gpus_per_replica: float, engine_args: dict[str, Any]
    ) -> tuple[str, str]:
        """The URL of a server that knows the model, and the model's name there."""
        # Imported here: a client of a server elsewhere needs neither Ray nor a registry.
        from tandem.cluster.local import connect
        from tandem.cluster.ports import free_ports
        from tandem.config import ServeConfig, ServedModelConfig
        from tandem.registry import Registry, called, find_model
        from tandem.sdk.serving import app_url
        from tandem.sdk.session import Session

        registry = Registry.open()
        cluster = connect()
        if cluster is not None and (url := app_url(cluster, ServeConfig().app)):
            if engine_args:
                raise ConfigError(
                    f"An app is up at {url} with settings of its own; {', '.join(engine_args)} cannot change them. "
                    "End it with `tandem serve down`, or leave them out."
                )
            return url, called(model, registry)
        source = find_model(model, registry)
        if isinstance(source, Path):
            served_as, name, base = source.name, source.name, str(source)
        else:
            # An adapter answers with its base. What was named by an id is called by it.
            served_as, base = None, str(source.base) if source.kind == "adapter" else source.id
            name = model if model in (source.name, source.id) else source.id
        served = ServedModelConfig(
            model=base,
            name=served_as,
            replicas=replicas,
            gpus_per_replica=gpus_per_replica,
            engine_args=engine_args,
        )
        session = Session()
        try:
            url = session.serve(config=ServeConfig(models=(served,)), port=free_ports(1)[0])
        except ConfigError as error:
            session.close()
            # Here they are keyword arguments, not keys of a file.
            raise ConfigError(
                f"tandem.LLM: {str(error).replace('models[0].engine_args.', '').replace('models[0].', '')}"
            ) from error
        except BaseException:
            session.close()
            raise
        # Also at the program's end, for those who never close it.
        self._stop = weakref.finalize(self, session.close)
        return url, name


def _check_arguments(engine_args: dict[str, Any]) -> None:
    """ConfigError for a misspelt argument of LLM itself, which would otherwise be taken for one of the engine's."""
    for name in engine_args:
        if hint := did_you_mean(name, OWN_ARGUMENTS, cutoff=OWN_CUTOFF):
            raise ConfigError(f"tandem.LLM has no argument {name!r}.{hint} Other arguments are those of vLLM's engine.")
