"""Uploaded files: content storage, database records, uploads in parts, checks of JSONL content.

Imports nothing, so that a child process that checks a content starts at once.
"""
