"""Engines: one loaded model each, which answers OpenAI requests; a folder and a descriptor for each kind."""
