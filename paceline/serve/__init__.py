"""HTTP in front of one engine: OpenAI's and Anthropic's forms, and Morph's apply. Needs the extra `serve`."""
