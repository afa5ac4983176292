"""Shared parts of the commands: console, errors, progress, and the address of an app."""
