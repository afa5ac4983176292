"""Supervision of a training run: attempts, health checks, restarts, and the processes of workers."""
