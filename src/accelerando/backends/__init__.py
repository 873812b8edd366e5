"""Backends, one file each: what compiles and runs a model."""
