"""What a compiled step takes on devices that need not be there: FLOPs, bytes, memory, time."""
