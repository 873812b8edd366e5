"""Hostile and damaged bundles, each made from a good one and each refused by its own code: see README.md."""
