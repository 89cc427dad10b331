"""How fast HOSL converges in T, Q and d_c beside what the theorem says (docs/results)."""
