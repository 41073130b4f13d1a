"""Judging frozen features: nearest neighbours and pictures."""
