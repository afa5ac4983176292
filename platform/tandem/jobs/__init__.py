"""Training jobs and sweeps: checked, submitted to Ray, followed, and summarized from their events."""
