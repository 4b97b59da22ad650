"""The exponential moving average of a network's variables, which is evaluated in their place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Average:
    """The rule by which each step updates the average of parameters and running statistics.

    The average moves by 1 - d towards the new variables, with d = min(decay, (1 + t) / (10 + t))
    after t steps: so it forgets the random start within a few steps.

    Attributes:
      decay: in [0, 1); 0: nothing is averaged, and the average is {}.
    """

    decay: float = 0.0

    def start(self, variables: Any) -> Any:
        """The average before the first step."""
        return jax.tree.map(jnp.copy, variables) if self.decay else {}

    def update(self, average: Any, variables: Any, done: jax.Array) -> Any:
        """The average after a step that made `variables`; `done`: steps before it, int32."""
        if not self.decay:
            return average
        done = done.astype(jnp.float32)
        share = 1 - jnp.minimum(self.decay, (1 + done) / (10 + done))
        return jax.tree.map(
            lambda old, new: old + share.astype(old.dtype) * (new - old), average, variables
        )
