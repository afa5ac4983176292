"""Ray clusters: a local one, nodes of a larger one, and the HAProxy that Ray Serve starts."""
