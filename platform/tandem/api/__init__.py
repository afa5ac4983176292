"""Fields of requests by route, shared by gateway and batch. vLLM parses the bodies themselves."""
