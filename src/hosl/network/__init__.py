"""The same run on two machines: `serve` and `join`, what the two sides agree on, and what leaves the device."""
