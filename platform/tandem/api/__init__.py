"""Wire models shared by gateway and clients. Empty so far: OpenAI's bodies are vLLM's to parse."""
