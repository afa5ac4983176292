"""Checkpoints: training state saved by all ranks and committed atomically; and export of the result for inference."""
