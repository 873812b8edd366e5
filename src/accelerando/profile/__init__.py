"""Where the time and the memory of a model go, and what this machine could do at best."""
