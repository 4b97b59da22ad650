"""The train step, its loop, and what both are built from."""
