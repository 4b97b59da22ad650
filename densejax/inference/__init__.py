"""What a trained network is used for: open it, classify image files, take it away as one file."""
