"""The search: what to try, trying it, and certifying what was found."""
