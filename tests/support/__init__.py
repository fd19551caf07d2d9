"""The real parts that tests run against: tiny models, vLLM in this process, vLLM's server."""
