"""The HTTP server of one engine: OpenAI's and Anthropic's APIs, and Morph's apply. Needs the extra `serve`."""
