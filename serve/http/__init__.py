"""OpenAI's HTTP API over any engine: plain ASGI, no Ray and no weights."""
