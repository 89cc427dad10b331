"""A tuned model in use: the next token from logits, the text that comes of it, and the halves that compute it."""
