"""From waveforms (B, S) to log-mel features (B, T, F), and the masks that hide parts of them in training."""
