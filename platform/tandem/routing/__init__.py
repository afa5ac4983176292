"""Selection of a replica for a request: index, policies, affinity memory and hash ring. Pure; imports neither Ray nor HTTP."""
