"""``gemq serve``: an OpenAI-compatible server that decodes many requests in one batch."""
