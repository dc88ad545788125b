"""The OpenAI-compatible URL in front of one or more workers."""
