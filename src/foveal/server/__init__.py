"""The OpenAI-compatible HTTP service. Needs the extra `serve`."""
