"""Download of the files of a hub dataset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tandem.registry.hub.cache import RepoCache
from tandem.registry.hub.client import Client
from tandem.registry.hub.models import bring, find_commit
from tandem.registry.hub.reference import HubDataset
from tandem.registry.hub.report import Report, TerminalReport
from tandem.registry.hub.selection import dataset_files


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFiles:
    """Files of a dataset, downloaded."""

    ref: HubDataset
    """With the commit as its revision: later it names the same files, and needs no network."""
    paths: tuple[Path, ...]
    """In the order of their names."""
    size: int
    """Bytes of all of them."""


def pull_dataset(ref: HubDataset, suffixes: tuple[str, ...], report: Report | None = None) -> DatasetFiles:
    """The files that `ref` names of those with one of the `suffixes`, downloaded if they were not.

    Revisions, and errors but UnknownModelError, as `pull_model`.
    """
    progress = report or TerminalReport()
    client, cache = Client.of(ref.repo, "dataset"), RepoCache.of(ref.repo, "dataset")
    listing = find_commit(client, cache, ref.revision, str(ref), progress)
    files = dataset_files(ref, listing.files, suffixes)
    folder = bring(client, cache, ref.revision, listing, files, str(ref), progress)
    return DatasetFiles(
        ref=replace(ref, revision=listing.commit),
        paths=tuple(folder / file.path for file in files),
        size=sum(file.size for file in files),
    )
