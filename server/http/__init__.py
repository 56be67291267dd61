"""The HTTP side: OpenAI's API, vLLM's extensions of it, and the admin API."""
