"""Finds, proves and ships the fastest faithful version of a trained model."""
