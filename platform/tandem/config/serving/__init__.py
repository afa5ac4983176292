"""Config of served apps and batch runs."""
