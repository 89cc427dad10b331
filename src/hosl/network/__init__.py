"""A run across two machines: `serve`, `join`, the settings that both sides agree on, and `audit`."""
