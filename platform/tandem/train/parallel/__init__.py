"""Parallel layouts of a model: device mesh, sharding, tensor, pipeline, expert and context parallelism, and DeepSpeed."""
