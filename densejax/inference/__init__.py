"""How a trained network is used: open it, classify image files, export it as one file."""
