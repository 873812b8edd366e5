"""The trainer: teaches a module that was cut what the original knew, within a budget of time."""
