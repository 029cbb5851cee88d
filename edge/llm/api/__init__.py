"""OpenAI's HTTP API over an engine, its figures, and a chat in the terminal."""
