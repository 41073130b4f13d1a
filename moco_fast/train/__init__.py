"""Pretraining: configuration, loop, checkpoints, and what is shown and recorded."""
