"""From audio with transcripts to the micro-batches of a training."""
