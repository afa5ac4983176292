"""Session: datasets, training and serving from Python, on the cluster at RAY_ADDRESS or a local one.

with tandem.Session() as session:
    session.dataset("questions.jsonl", "questions", tokenizer="my-text")
    adapter = session.train("sft.yaml", "steps=200")
    url = session.serve("my-model")
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Self

from tandem.cluster.local import Cluster
from tandem.config import ServeConfig, ServedModelConfig, TrainConfig, apply_overrides, from_dict, load_yaml
from tandem.config.load import parse_yaml
from tandem.data.index import DatasetIndex
from tandem.errors import ConfigError, DataError, JobError, did_you_mean
from tandem.jobs.prepare import prepare
from tandem.sdk.adapters import AuditedAdapters
from tandem.sdk.cluster import open_cluster
from tandem.sdk.console import console
from tandem.sdk.datasets import build, describe
from tandem.sdk.keys import Keys
from tandem.sdk.serving import CPUS, listener, serving
from tandem.sdk.summary import print_result
from tandem.sdk.training import follow
from tandem.settings import settings


class Session:
    """One cluster and what is done on it; `close`, or the end of a `with` block, stops all that it started."""

    def __init__(self, *, num_cpus: int = CPUS) -> None:
        """`num_cpus`: logical CPUs of a local cluster, if one has to be started; that happens when it is first needed."""
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._num_cpus = num_cpus

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving, and the cluster if it is ours."""
        self._cluster = None
        self._stack.close()

    @property
    def cluster(self) -> Cluster:
        """The cluster, started now if there is none."""
        if self._cluster is None:
            self._cluster = self._stack.enter_context(open_cluster(num_cpus=self._num_cpus))
        return self._cluster

    def dataset(
        self, source: str, name: str, *, tokenizer: str | None = None, vocab_size: int = 4096, limit: int | None = None
    ) -> DatasetIndex:
        """Build a dataset in TANDEM_HOME/data, unless one of that name is there and whole."""
        folder = settings().data_dir / name
        try:
            index = DatasetIndex.load(folder)
            console.print(f"  [dim]·[/] {name} is there: {describe(index)}")
        except DataError:
            index = build(
                source, folder, tokenizer=tokenizer, vocab_size=vocab_size, limit=limit, replace=folder.exists()
            )
            console.print(f"  [dim]·[/] {name}: {describe(index)}")
        return index

    def train(self, config: TrainConfig | str | Path, *overrides: str) -> str:
        """Run a job to its end, unless it is finished already; returns the id of the model or adapter it made.

        One that is not registered has no id: then its folder.

        `config` is a TrainConfig or a YAML file; each of `overrides` is `key=value`. Raises JobError if the job fails.
        """
        job_config = config if isinstance(config, TrainConfig) else load_yaml(TrainConfig, Path(config), overrides)
        job = prepare(job_config)
        if job.finished():
            print_result(job)
        elif status := follow(self.cluster, job):
            raise JobError(f"{job.id} ended with status {status}. `tandem doctor` checks this machine.")
        end = job.finished()
        if end is None:
            raise JobError(f"{job.id} has no result in {job.export}.")
        return str(end.model or job.export)

    @property
    def adapters(self) -> AuditedAdapters:
        """Register, promote, roll back, pin and delete adapters; what is served follows at the next request."""
        return AuditedAdapters.open()

    @property
    def keys(self) -> Keys:
        """Create, list, rotate and revoke API keys of the app; neither needs an app or a cluster that is up."""
        return Keys.open()

    def serve(self, *models: str, port: int | None = None, config: ServeConfig | None = None) -> str:
        """Serve models until the session ends; returns the base URL for an OpenAI client once they answer."""
        app_config = config or ServeConfig(models=tuple(ServedModelConfig(model=name) for name in models))
        return self._stack.enter_context(serving(self.cluster, app_config, listener(app_config, port=port)))


def recipe(name: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """One of the recipes that come with the package, with values changed."""
    known = {file.name.removesuffix(".yaml"): file for file in files("tandem.sdk").joinpath("recipes").iterdir()}
    if name not in known:
        raise ConfigError(f"There is no recipe {name!r}; known: {', '.join(sorted(known))}.{did_you_mean(name, known)}")
    text = known[name].read_text()
    return from_dict(TrainConfig, apply_overrides(parse_yaml(text), overrides))
