"""Facts about networks: counts, feature reuse, rooflines, plots."""
