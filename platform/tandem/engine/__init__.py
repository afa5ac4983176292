"""One loaded model that answers OpenAI requests."""
