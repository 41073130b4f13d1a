"""Checkpoints of one library in the layout of another, exactly: docs/checkpoints.md."""
