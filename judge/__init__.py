"""Other people's tests, run against our URL and against vLLM's own server, and compared."""
