"""Text generation: sampling, decoding with a KV cache, constraints, streaming text."""
