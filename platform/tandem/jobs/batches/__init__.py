"""Batches as OpenAI's API describes them: a file of requests, answered by the engines that serve."""
