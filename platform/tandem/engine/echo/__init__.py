"""Echo engine: a fake for tests and demonstrations."""
