"""What a curious server can rebuild from what it gets: attacks on activations, to be measured on one's own data."""
