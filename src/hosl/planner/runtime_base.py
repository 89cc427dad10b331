"""The memory of Python with a client's runtime, before any weight. No torch: a running client needs the number, too."""

RUNTIME_BASE_BYTES = 345.0 * 2**20
"""Bytes with torch and transformers on x86-64, measured (docs/concepts/memory.md); `hosl bench plan` measures anew."""
