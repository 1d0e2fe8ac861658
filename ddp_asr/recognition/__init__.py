"""A trained model applied to audio."""
