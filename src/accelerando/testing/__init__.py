"""Contract tests, fakes and sabotage, published for plugins of other packages."""
