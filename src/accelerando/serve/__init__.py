"""The runtime: what a bundle does once the search is over."""
