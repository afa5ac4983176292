"""Tandem trains LLMs and serves them on one Ray cluster."""

__version__ = "0.1.0"
