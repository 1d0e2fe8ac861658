"""From transcripts to classes and back, and texts against texts."""
