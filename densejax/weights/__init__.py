"""Weights of other projects and of this one: their files, their names, their conversion."""
