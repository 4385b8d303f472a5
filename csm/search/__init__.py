"""Searching for settings: spaces of configurations, what to try next, which trials are best, and which settings mattered."""
