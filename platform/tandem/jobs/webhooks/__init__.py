"""Webhooks: ends of fine-tuning jobs and batches, recorded for each endpoint and delivered at least once."""
