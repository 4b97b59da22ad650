"""densejax: a laboratory for densely connected networks in JAX and Flax linen."""

import time

STARTED = time.monotonic()  # seconds to the first step are counted from here
__version__ = "0.1.0"
