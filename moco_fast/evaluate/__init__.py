"""Judging frozen features: nearest neighbours, linear classifiers and pictures."""
