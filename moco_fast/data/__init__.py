"""Datasets, two-crop augmentation and loaders."""
