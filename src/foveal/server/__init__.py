"""The OpenAI-compatible service and its page."""
