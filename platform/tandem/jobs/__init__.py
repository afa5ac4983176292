"""Training jobs: checked before they start, submitted to Ray, followed to their end."""
