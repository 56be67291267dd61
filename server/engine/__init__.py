"""The engine: requests, scheduling, paged KV cache, forward passes, sampling. Runs without any HTTP package."""
