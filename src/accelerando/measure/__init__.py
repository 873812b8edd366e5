"""Measuring: the one judge of speed, quality and memory."""
