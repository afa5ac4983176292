"""vLLM engine. The only folder that imports vllm."""
