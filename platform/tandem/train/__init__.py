"""Training: model, parallelism, loop, checkpointed runs, and the Ray Train worker and driver around them."""
