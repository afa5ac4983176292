"""The ingress: names resolved, requests routed, bytes copied."""
