"""Training objectives: next-token prediction and preference optimization, and their evaluation."""
