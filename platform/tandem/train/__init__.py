"""Trains models: a mesh, a loop that knows only torch, and the Ray Train worker and driver around it."""
