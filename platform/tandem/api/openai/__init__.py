"""Wire models of OpenAI's resources: files, uploads, fine-tuning jobs, batches."""
