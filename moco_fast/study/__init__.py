"""Sweeps that answer a question: which points, running them, table and figure."""
