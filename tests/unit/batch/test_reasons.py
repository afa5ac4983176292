"""Why a run was given up, out of what Ray Data raises."""

from __future__ import annotations

import pytest
import ray.exceptions

from tandem.batch.reasons import explained

OF_A_WORKER = """ray::MapWorker(MapBatches(Worker)).submit() (pid=9377)
  File "worker.py", line 16, in __call__
    raise away.exceptions[0] from None
tandem.errors.StorageError: s3://x cannot be read: ValueError: two
lines. Check it.

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block.
To change retry attempts, backoff, or which errors are retried, configure what is transient."""
OF_A_READER = """ray::ReadPieces() (pid=11580)
tandem.errors.DataError: a.jsonl cannot be read: no such file
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure what is transient."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (OF_A_WORKER, "s3://x cannot be read: ValueError: two\nlines. Check it."),
        (OF_A_READER, "a.jsonl cannot be read: no such file"),
    ],
)
def test_a_run_ends_with_the_words_of_whoever_failed_and_how_it_goes_on(text: str, reason: str) -> None:
    error = ray.exceptions.RayTaskError("submit", text, ValueError("UDF failed"))
    assert str(explained("tiny", error, [], 3)) == (
        f"tiny cannot answer: {reason} What is published stays; the same command resumes."
    )
