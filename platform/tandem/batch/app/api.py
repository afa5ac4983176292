"""Protocol of an app that answers the rows of a batch run."""

from __future__ import annotations

from typing import IO, Protocol

from tandem.api.openai.batches import Batch


class BatchApi(Protocol):
    """The batches and files of one app, as one key sees them.

    Every method raises a TandemError: ClusterError where nobody answers, UnknownJobError for a batch that is not there.
    """

    def check_model(self, name: str) -> None:
        """UnknownModelError if the app serves no model or adapter of that name."""
        ...

    def upload(self, requests: IO[bytes]) -> str:
        """The id of a new file of these lines."""
        ...

    def create(self, file_id: str, endpoint: str, idempotency_key: str) -> str:
        """The id of a batch of a file; that of the batch which was created before under this idempotency key."""
        ...

    def get(self, batch_id: str) -> Batch:
        """One batch."""
        ...

    def cancel(self, batch_id: str) -> None:
        """Cancel a batch; one that has ended stays as it is."""
        ...

    def download(self, file_id: str, into: IO[bytes]) -> None:
        """Append the content of a file."""
        ...

    def delete(self, file_id: str) -> None:
        """Delete a file."""
        ...
