"""What compiled steps take on devices that need not be there: FLOPs, bytes, memory, time."""
