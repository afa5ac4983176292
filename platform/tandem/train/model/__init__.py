"""Model to train: construction, forward pass of a stage, attention, precision, recomputation, compilation."""
