"""Techniques, one file each: what changes a model."""
