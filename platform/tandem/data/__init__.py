"""Data pipeline: corpus, WebDataset shards, Ray Data, packed rows, in an order that a resumed run continues exactly."""
