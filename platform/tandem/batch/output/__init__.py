"""Output of a batch run: result files and the manifest."""
