"""Check that all nodes of a cluster see the same files, before a job or an app starts on them."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path

from tandem.cluster.health.cordons import placeable_nodes
from tandem.errors import ClusterError
from tandem.storage import disk_errors

TIMEOUT_S = 20.0
"""Seconds that all nodes together have to look. One that does not answer is none that is used; Ray gives it up by itself."""


def check_same_files(home: Path, folders: Sequence[Path] = ()) -> None:
    """ClusterError that names nodes of the connected cluster on which `home` is another folder, or one of `folders` not there.

    A file with a random word is written to `home`, and every node reads it. A cluster of one node is not asked, nor are cordoned
    nodes.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node.id: node.address for node in placeable_nodes()}
    if len(set(nodes.values())) < 2:
        return
    word = secrets.token_hex(16)
    token = home / f".same-files-{word[:8]}"
    with disk_errors("checking that all nodes share it", home):
        home.mkdir(parents=True, exist_ok=True)
        token.write_text(word)
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_look)
        tasks = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                str(token), [str(folder) for folder in folders]
            ): address
            for node, address in nodes.items()
        }
        done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=TIMEOUT_S)
        problems = []
        for task in done:
            with contextlib.suppress(ray.exceptions.RayError):  # the node has just gone
                seen, missing = ray.get(task)
                if seen != word:
                    problems.append(f"{home} (TANDEM_HOME) is another folder on {tasks[task]}, or not there.")
                problems += [f"{folder} is not there on {tasks[task]}." for folder in missing]
        for task in set(tasks) - set(done):
            ray.cancel(task)
    finally:
        token.unlink(missing_ok=True)
    if problems:
        raise ClusterError(
            f"The {len(nodes)} nodes of this cluster do not see the same files: {' '.join(sorted(problems))} Mount one file "
            "system at the same path on every node, and set TANDEM_HOME below it; `tandem cluster cordon` keeps a node out "
            "until then."
        )


def _look(token: str, folders: list[str]) -> tuple[str | None, list[str]]:
    """On a node: the word in the token file, and the folders that are not there."""
    try:
        word = Path(token).read_text()
    except OSError:
        word = None
    return word, [folder for folder in folders if not Path(folder).is_dir()]
