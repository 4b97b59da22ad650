"""densejax: a laboratory for densely connected networks in JAX and Flax linen."""

import sys
import time

_command = sys.argv[0] if sys.argv else ""
if _command == "-m":  # Python has not replaced it by the module's file yet
    _command = sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0]
if _command == __name__ or _command.endswith("/densejax"):
    # A command, whose imports take seconds.
    from densejax.runs import interrupt

    interrupt.watch()
STARTED = time.monotonic()  # seconds to the first step are counted from here
__version__ = "0.1.0"


def create(name: str, num_classes: int = 1000, weights: str = "", channels: int = 3, **fields):
    """A network and its variables, by name.

        model, variables = densejax.create("densenet121", weights="weights/densenet121")
        image = (photograph - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)  # 224x224x3
        logits, features = model.apply(variables, image[None].astype("float32"))

    Args:
      name: of `densejax.models.MODELS`.
      num_classes: length of the logits; 0: no classifier, the logits are None.
      weights: a directory of `densejax.pretrained`; "" draws the variables, from seed 0.
      channels: of the images, where the variables are drawn.
      **fields: that differ from the named network's, such as `dropout_rate=0.2`. What projects
        choose differently, such as `batch_norm_epsilon`, is otherwise as the weights have it.

    Returns:
      (model, variables): `model.apply(variables, images)` maps float32 images [batch, height,
      width, channels], normalised, to (logits [batch, num_classes], features by stage).

    Raises:
      densejax.config.UserError: an unknown name or field, or weights of another network.
    """
    # Imported here: `import densejax` stays light.
    import jax
    import jax.numpy as jnp

    from densejax import models
    from densejax.config import UserError
    from densejax.models import convolution

    named = models.fields(name, **fields)
    model = models.create(named, num_classes)

    def draw(channels):
        return model.init(jax.random.key(0), jnp.zeros((1, 224, 224, channels)))

    if not weights:
        # Within a function that is traced, such as by `jax.eval_shape`, options are that one's.
        is_traced = isinstance(jnp.zeros(()), jax.core.Tracer)
        options = None if is_traced else convolution.quick_compilation(jax.default_backend())
        return model, jax.jit(draw, static_argnums=0, compiler_options=options)(channels)

    from densejax.weights import store

    description, variables = store.load(weights)
    found = description["model"]
    expected = jax.eval_shape(lambda: draw(description["image_channels"]))
    fit = jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    # Networks that differ only in these fields may have the same variables.
    joined = all(found.get(f) == named.get(f) for f in store.JOINING_FIELDS if f not in fields)
    if not (fit and joined):
        raise UserError(
            f"weights={weights}: of {models.described(found)} with {description['num_classes']} "
            f"classes, not of a {name} with {num_classes} classes"
        )
    return models.create(found | fields, num_classes), variables


def train(config, workdir: str = "", callbacks=(), force: bool = False):
    """Trains, or resumes, as `python -m densejax.main` does; from a script or a notebook.

        config = configs.digits.get_config("depth=22")
        result = densejax.train(config, "runs/mine", callbacks=[lambda step, values: ...])

    Arrays in memory become a data set by `densejax.data.add`.

    Args:
      config: the whole configuration, as a card makes it.
      workdir: the run directory; "": as for the command, by the configuration.
      callbacks: each is called with (step, {name: value}) whenever metrics are logged.
      force: go on in the directory of another configuration.

    Returns:
      What the run's summary.json holds, such as "test_accuracy"; None where a signal (Ctrl-C, or
      the stop button of a notebook) has ended the run early: the same call goes on from there.

    Raises:
      densejax.config.UserError: a mistake in the configuration, data or directory, in one line.
    """
    import os

    from densejax.config import checked
    from densejax.data import encoded
    from densejax.runs import files
    from densejax.runs import workdir as run_directory
    from densejax.training import loop, parallel, result

    global STARTED
    STARTED = time.monotonic()  # of this run: another one may have been before it
    encoded.open_splits.cache_clear()  # files may have changed since an earlier run
    config = checked(config)  # the directory is named after all values
    if config.evaluate.assess:
        from densejax.analysis import assessment  # matplotlib may be missing
    parallel.start()
    directory = os.fspath(workdir or "") or run_directory.default(config)
    loop.run(config, directory, force=force, callbacks=callbacks)
    path = files.path_of("workdir", directory)
    if config.evaluate.assess:
        assessment.at_the_end(path, config)
    # A run that was stopped may have the result of an earlier configuration, code or data.
    return result.finished(path, config, result.versions(config), force=True)
