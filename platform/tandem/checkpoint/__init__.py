"""What a run needs to go on, saved by all ranks and published in one step; and what others need to use its result."""
