"""Config of training jobs and sweeps: frozen dataclasses that check themselves."""
