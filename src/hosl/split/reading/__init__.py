"""From a model's name or folder to its config, weights and tokenizer. Needs neither a cut nor a half."""
