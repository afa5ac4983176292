"""Download and registration of hub models."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from tandem.errors import HubError, HubUnreachableError, UnknownModelError
from tandem.ids import folder_digest
from tandem.registry.hub.cache import RepoCache
from tandem.registry.hub.client import Client, Listing
from tandem.registry.hub.reference import COMMIT, DEFAULT_REVISION, HubModel
from tandem.registry.hub.report import Report, TerminalReport
from tandem.registry.hub.selection import RepoFile, model_files
from tandem.registry.records import ModelRecord
from tandem.registry.store import Registry
from tandem.settings import hub_offline, settings


def pull_model(ref: HubModel, registry: Registry, report: Report | None = None) -> ModelRecord:
    """The record of a model of the hub, downloaded and registered under `org/name` if it was not.

    A branch or tag is asked for each time; where the hub does not answer, or HF_HUB_OFFLINE is set, it is the commit that it was
    when it was asked for last. A commit that is here is not asked for. What the default branch means becomes what the name means;
    another revision only where the name means nothing yet.

    Raises UnknownModelError (no such model, with the nearest local name), HubUnreachableError, HubError (gated, no such revision,
    no safetensors) or StorageError (no room).
    """
    progress = report or TerminalReport()
    client, cache = Client.of(ref.repo, "model"), RepoCache.of(ref.repo, "model")
    try:
        listing = find_commit(client, cache, ref.revision, str(ref), progress)
    except (UnknownModelError, HubUnreachableError) as error:
        raise type(error)(f"{error}{_similar_name_hint(registry, ref)}") from error
    files = model_files(ref, listing.files)
    folder = bring(client, cache, ref.revision, listing, files, str(ref), progress)
    content = folder_digest(folder, {file.path: file.sha256 for file in files if file.sha256})
    record = registry.register_hub_model(
        ref.repo,
        folder,
        content,
        lineage={"hub": ref.repo, "revision": ref.revision, "commit": listing.commit},
        promote=True if ref.revision == DEFAULT_REVISION else None,
    )
    # The same content may have been registered from another commit, whose links were removed since.
    restore(record.path)
    return record


def restore(path: Path) -> Path:
    """`path`; if it is the folder of a model of the hub that this node does not have, it is downloaded to it first.

    So each node that has a home of its own downloads a model once, when an engine or a training worker first needs it.
    """
    root = settings().hub_dir
    if not path.is_relative_to(root):
        return path
    match path.relative_to(root).parts:
        case (folder, "snapshots", commit) if folder.startswith("models--") and COMMIT.fullmatch(commit):
            repo = folder.removeprefix("models--").replace("--", "/", 1)
            ref = HubModel(repo=repo, revision=commit)
            client, cache, progress = Client.of(repo, "model"), RepoCache.of(repo, "model"), TerminalReport()
            if path.is_dir() and commit not in cache.load_state().commits:
                return path  # complete: links are made when all files are here; what is lost is only the list of them
            listing = find_commit(client, cache, commit, str(ref), progress)
            return bring(client, cache, commit, listing, model_files(ref, listing.files), str(ref), progress)
    return path


def find_commit(client: Client, cache: RepoCache, revision: str, model_name: str, report: Report) -> Listing:
    """The commit and files of a revision: by the hub, or by its last answer. Errors as `pull_model`."""
    state = cache.load_state()
    commit = revision if COMMIT.fullmatch(revision) else state.revisions.get(revision)
    local_listing = Listing(commit=commit, files=state.commits[commit]) if commit in state.commits and commit else None
    if local_listing is not None and (local_listing.commit == revision or hub_offline()):
        return local_listing
    try:
        return client.listing(revision)
    except HubUnreachableError as error:
        if local_listing is None:
            other_revisions = ", ".join(sorted({*state.revisions, *state.commits})[:5])
            hint = f" At other revisions it is here: {other_revisions}." if other_revisions else ""
            raise HubUnreachableError(
                f"{model_name} is not on this machine, and {_reason(error)}.{hint} {_next_step()}"
            ) from error
        seen = state.seen.get(revision, "")
        report.note(
            f"{error}. {model_name} is taken from this machine: commit {local_listing.commit[:12]}, which it was at {seen}"
        )
        return local_listing


def bring(
    client: Client,
    cache: RepoCache,
    revision: str,
    listing: Listing,
    files: Iterable[RepoFile],
    model_name: str,
    report: Report,
) -> Path:
    """The folder of a commit with these files, whole; only what is missing is downloaded."""
    needed_files = list(files)
    state = cache.load_state()
    is_current = revision == listing.commit or state.revisions.get(revision) == listing.commit
    if is_current and listing.commit in state.commits and not cache.missing(listing.commit, needed_files):
        return cache.snapshot(listing.commit)
    with cache.lock(report):
        try:
            folder = cache.fetch(client, listing.commit, needed_files, report)
        except HubUnreachableError as error:
            missing_files = cache.missing(listing.commit, needed_files)
            raise HubUnreachableError(
                f"{model_name} is not on this machine: {len(missing_files)} of its {len(needed_files)} files are missing, and "
                f"{_reason(error)}. {_next_step()}"
            ) from error
        cache.save_listing(revision, listing.commit, listing.files)
    return folder


def _reason(error: HubError) -> str:
    message = str(error)
    return message[0].lower() + message[1:] if message.startswith("The ") else message


def _next_step() -> str:
    if hub_offline():
        return "Unset HF_HUB_OFFLINE to download it, or give a folder."
    return "Check the network, HTTPS_PROXY and HF_ENDPOINT, or give a folder; then run the same command again."


def _similar_name_hint(registry: Registry, ref: HubModel) -> str:
    """A hint at a local name that is near: names are compared without their organisations, which make any two alike."""
    repo_name = ref.repo.partition("/")[2]
    neighbours = [*registry.near(ref.repo), *registry.near(repo_name)]
    full_names = {neighbour.rpartition("/")[2]: neighbour for neighbour in neighbours if neighbour != ref.repo}
    matches = difflib.get_close_matches(repo_name, full_names, n=1, cutoff=0.6)
    return f" Did you mean {full_names[matches[0]]!r}? That one is registered here." if matches else ""
