"""What Python takes with a client's runtime before any weight. No torch: a running client asks, too."""

RUNTIME_BASE_BYTES = 345.0 * 2**20
"""With torch and transformers, x86-64: measured, docs/concepts/memory.md; `hosl bench plan` measures it anew."""
