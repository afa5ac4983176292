"""Rows and tokens a second out of shards, tokenised and packed: Tandem's stream beside webdataset's loader and torch's.

    python -m bench.training.data [--readers 1 2] [--rounds 3] [--smoke] [--json FILE] [--check]

All read the same WebDataset shards (the standard library's sources) with the same tokenizer and the same packing, shuffle, give
batches of the same shape to one process, and have `readers` processes that read: tasks of Ray Data for Tandem, whose blocks are
not kept from epoch to epoch here; workers of a DataLoader for the others.

- webdataset: WebDataset(shards, shardshuffle) -> text -> packed rows -> shuffle -> batched, through its own WebLoader
- dataloader: a torch DataLoader over an IterableDataset that reads tar files and packs them
- tandem: open_stream(...).rows(0, 1)

A run counts rows after the first ones; a share is the median over rounds of the ratio inside a round, in which the peers follow
each other in turn. Each then feeds a consumer that computes for a fixed time between two batches, on no core of this machine, as
a GPU does: fast enough to take 0.8 of the rows/s that webdataset's loader reached in that round. What it waits for batches is
shown as a share of its time.

`--check` exits 1, and prints the worst figure last, unless Tandem reaches 1.0 of webdataset's loader with every number of readers
and its consumer waits less than 2 % of its time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ROOT

BAR = 1.0
WAIT_BAR = 0.02
PEERS = ("webdataset", "dataloader", "tandem")
PACE = 0.8
"""Rate of the paced consumer, as a share of webdataset's rows/s."""


def main() -> int:
    parser = options_parser(__doc__, smoke="one round of few rows")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20_000, help="rows that are counted in a run")
    parser.add_argument("--first", type=int, default=3_000, help="rows before those")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--pace", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(count(options)), flush=True)
        return 0
    if options.smoke:
        options.rounds, options.rows, options.first = 1, 1500, 500
    results = measure(options)
    report.show(title(results), COLUMNS, cells(results), names=2, width=130)
    report.write(options.json, results, markdown(results))
    return report.judge(verdicts(results), check=options.check)


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every peer `rounds` times with each number of readers, in alternation: at full speed, and before the consumer."""
    from tandem.cluster.local import LocalCluster
    from tandem.data.build import build_dataset
    from tandem.settings import export

    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    # DataLoader's workers run at niceness 0 and Ray's at 15: beside other work, that is what would be measured.
    export({"RAY_worker_niceness": "0"})
    cluster = None
    try:
        index = build_dataset("stdlib", folder / "data", limit=120 if options.smoke else None)
        cluster = LocalCluster.start(num_cpus=8)
        all_rounds = report.Rounds(options.json)
        rounds: dict[int, list[dict[str, dict[str, float]]]] = {readers: [] for readers in options.readers}
        for number, readers in itertools.product(range(options.rounds), options.readers):
            figures = {peer: run(peer, readers, folder, options, str(cluster.address)) for peer in PEERS}
            pace = PACE * figures["webdataset"]["rows_per_s"]
            for peer in PEERS:
                figures[peer]["wait"] = run(peer, readers, folder, options, str(cluster.address), pace=pace)["wait"]
            rounds[readers].append(figures)
            all_rounds.append({"readers": readers, **figures})
            line = "; ".join(
                f"{peer} {f['rows_per_s']:,.0f} rows/s, waits {f['wait']:.1%}" for peer, f in figures.items()
            )
            print(f"round {number + 1}, {readers} readers: {line}", flush=True)
    finally:
        if cluster:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "rounds": rounds, "pace": PACE, "row_tokens": options.length, "batch_rows": options.batch, "counted_rows": options.rows,
        "shards": len(index.shards), "cores": os.cpu_count(), "load_before": load,
    }  # fmt: skip


def environment(folder: Path, address: str) -> dict[str, str]:
    """Environment variables of every peer: one thread a process."""
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "TANDEM_HOME": str(folder / "home"), "RAY_ADDRESS": address,
    }  # fmt: skip


def run(
    peer: str, readers: int, folder: Path, options: argparse.Namespace, address: str, *, pace: float | None = None
) -> dict[str, float]:
    """The figures of `count` for one run of one peer, in a process of its own."""
    command = [
        sys.executable, "-m", "bench.training.data", "--peer", peer, "--readers", str(readers), "--folder", str(folder),
        "--rows", str(options.rows), "--first", str(options.first),
        "--batch", str(options.batch), "--length", str(options.length), *(["--pace", str(pace)] if pace else []),
    ]  # fmt: skip
    process = subprocess.run(
        command, env=environment(folder, address), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"{peer} ended with status {process.returncode}:\n{process.stderr[-3000:]}")
    return dict(json.loads(process.stdout.splitlines()[-1]))


# ---- the peers ------------------------------------------------------------------------------------------------------


def count(options: argparse.Namespace) -> dict[str, float]:
    """One run of one peer in this process: {rows_per_s, wait}; with --pace, a consumer that takes so many rows a second."""
    (readers,) = options.readers
    batches = {"webdataset": by_webdataset, "dataloader": by_dataloader, "tandem": by_tandem}[options.peer]
    with contextlib.closing(batches(options, readers)) as row_batches:
        rows_taken = 0
        while rows_taken < options.first:
            rows_taken += len(next(row_batches))
        start_time, rows_taken, waited_s = time.perf_counter(), 0, 0.0
        while rows_taken < options.rows:
            request_time = time.perf_counter()
            rows = next(row_batches)
            waited_s += time.perf_counter() - request_time
            assert rows.shape[1:] == (3, options.length), rows.shape
            rows_taken += len(rows)
            if options.pace:
                time.sleep(len(rows) / options.pace)
        seconds = time.perf_counter() - start_time
        return {"rows_per_s": rows_taken / seconds, "wait": waited_s / seconds}


def parts_of(options: argparse.Namespace) -> tuple[Any, list[str], Any]:
    """The index, the shards and the packing that all peers share."""
    from tandem.data.index import DatasetIndex
    from tandem.data.spec import PackSpec
    from tandem.data.tokenize import TextEncoder

    folder = options.folder / "data"
    index = DatasetIndex.load(folder)
    encoder = TextEncoder(str(folder / "tokenizer"))
    spec = PackSpec(encoder=encoder, kind=index.kind, length=options.length, loss_on_all=False)
    return index, [str(path) for path in index.shard_paths(folder)], spec


def by_webdataset(options: argparse.Namespace, readers: int) -> Generator[Any, None, None]:
    """The webdataset package's pipeline and loader."""
    import numpy as np
    import torch
    import webdataset

    from tandem.data.sources.samples import Text

    _, shards, spec = parts_of(options)

    def packed(texts: Iterable[bytes]) -> Generator[Any, None, None]:
        # As many at a time as make it worth calling the tokenizer for a batch.
        batch: list[Text] = []
        for data in texts:
            batch.append(Text(data.decode()))
            if len(batch) == 32:
                yield from spec.rows(batch)
                batch = []

    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), workersplitter=webdataset.split_by_worker)
        .map(lambda sample: sample["txt"])
        .compose(packed)
        .shuffle(512)
        .batched(options.batch, collation_fn=lambda rows: torch.from_numpy(np.stack(rows)))
        .repeat()
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=readers, prefetch_factor=4)
    yield from loader


def by_dataloader(options: argparse.Namespace, readers: int) -> Generator[Any, None, None]:
    """A torch DataLoader over tar files."""
    import random

    import torch.utils.data

    from tandem.data.shards import read_samples

    _, shards, spec = parts_of(options)

    class Shards(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Generator[Any, None, None]:
            worker = torch.utils.data.get_worker_info()
            assert worker is not None
            for epoch in itertools.count():
                order = random.Random(epoch).sample(shards, len(shards))
                for path in order[worker.id :: worker.num_workers]:
                    rows = spec.rows(read_samples([Path(path)]))
                    yield from rows[random.Random(epoch).sample(range(len(rows)), len(rows))]

    yield from torch.utils.data.DataLoader(Shards(), batch_size=options.batch, num_workers=readers, prefetch_factor=4)


def by_tandem(options: argparse.Namespace, readers: int) -> Generator[Any, None, None]:
    """The stream of a training job with one rank."""
    from tandem import settings
    from tandem.cluster.local import authentication

    settings.export(authentication())
    import ray

    from tandem.config import DataConfig
    from tandem.data.index import Part
    from tandem.data.stream import open_stream

    index, _, spec = parts_of(options)
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
    config = DataConfig(path="x", sequence_length=options.length, reader_tasks=readers, readers=1.0)
    part = Part(folder=options.folder / "data", location=options.folder / "data", index=index)
    stream = open_stream((part,), spec.encoder, config, workers=1, seed=0, held_bytes=0)
    try:
        with contextlib.closing(stream.rows(0, 1, None)) as rows:
            while True:
                yield rows.take(options.batch)
    finally:
        ray.kill(stream.reader)
        ray.shutdown()


# ---- results ---------------------------------------------------------------------------------------------------------


def shares(results: dict[str, Any], readers: int, peer: str) -> list[float]:
    """Of each round, Tandem's rows a second as a share of a peer's."""
    return [figures["tandem"]["rows_per_s"] / figures[peer]["rows_per_s"] for figures in results["rounds"][readers]]


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """The figures that have a bar, with their verdicts."""
    verdict_list = []
    for readers in results["rounds"]:
        share = statistics.median(shares(results, readers, "webdataset"))
        message = f"{readers} readers: Tandem has {share:.2f} of webdataset's rows/s; the bar is {BAR}"
        verdict_list.append(Verdict(share >= BAR, share / BAR, message))
        wait = waits(results, readers, "tandem")
        message = f"{readers} readers: the consumer waits for data {wait:.2%} of its time; the bar is {WAIT_BAR:.0%}"
        verdict_list.append(Verdict(wait < WAIT_BAR, WAIT_BAR / max(wait, 1e-9), message))
    return verdict_list


def waits(results: dict[str, Any], readers: int, peer: str) -> float:
    """The share of its time that a peer's consumer waited, the median of the rounds."""
    return statistics.median(figures[peer]["wait"] for figures in results["rounds"][readers])


COLUMNS = ("readers", "peer", "rows/s", "tokens/s", "Tandem's share (least-most)", "consumer waits")


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    rows = []
    for readers, rounds in results["rounds"].items():
        for peer in PEERS:
            rate = statistics.median(figures[peer]["rows_per_s"] for figures in rounds)
            ratios = shares(results, readers, peer)
            share = (
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if peer != "tandem" else "-"
            )
            tokens, wait = f"{rate * results['row_tokens']:,.0f}", f"{waits(results, readers, peer):.2%}"
            rows.append([str(readers), peer, f"{rate:,.0f}", tokens, share, wait])
    return rows


def title(results: dict[str, Any]) -> str:
    """Title of the table: workload and machine."""
    count_of_rounds = len(next(iter(results["rounds"].values())))
    return (
        f"{results['cores']} cores (load {results['load_before']:.1f} before), {results['shards']} shards, rows of "
        f"{results['row_tokens']} tokens in batches of {results['batch_rows']}, {results['counted_rows']:,} rows a run, "
        f"medians of {count_of_rounds} rounds"
    )


def markdown(results: dict[str, Any]) -> str:
    """The result for a page."""
    table = report.markdown_table(COLUMNS, cells(results))
    return f"# Data\n\n{title(results)}.\n\n{table}\n\n{report.verdict_lines(verdicts(results))}\n"


if __name__ == "__main__":
    sys.exit(main())
