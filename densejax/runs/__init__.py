"""A run's directory and everything on disk and between processes that has to survive a crash."""
