"""From logits (B, T', V) to hypotheses, one module a decoder."""
