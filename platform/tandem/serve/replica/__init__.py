"""Engine replica: the Serve deployment, its HTTP server, and the adapters its engine holds."""
