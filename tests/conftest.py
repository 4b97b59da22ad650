"""A strict session: four CPU devices, no implicit dtype promotion, warnings are errors."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis  # noqa: E402
import jax  # noqa: E402
from absl import flags  # noqa: E402

import tests.session  # noqa: E402, F401  # before any test: it turns the compilation cache on

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")

define = flags.FlagValues.__setitem__


def redefine(values, name, flag):
    """Defines a flag; the tests import several commands, which have flags of the same names."""
    flag.allow_override |= values.find_module_defining_flag(name, "").startswith("densejax.")
    define(values, name, flag)


flags.FlagValues.__setitem__ = redefine

# The same examples in every run; --hypothesis-profile=search looks for others, and longer.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=3000)
hypothesis.settings.load_profile("tests")
