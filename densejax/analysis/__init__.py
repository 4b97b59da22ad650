"""Facts about trained and untrained networks, and the figures that show them."""
