"""Low-rank adapters: LoRA, DoRA, 4-bit bases, and merging into a base."""
