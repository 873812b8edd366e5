"""Figures, measured: run them with `scripts/bench`.  Nothing here is shipped."""
