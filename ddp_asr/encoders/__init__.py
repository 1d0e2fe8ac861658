"""Encoders: features (B, T, F) and frames (B,) -> hidden states (B, T', D), one module a kind."""
