"""Shared parts of the commands: error display, signals, and streaming chats."""
