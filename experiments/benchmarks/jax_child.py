"""The process of an implementation on JAX: ours, plain flax or Keras (see turns.py).

The implementation "draw" is the first of all: it writes the weights and the batch that every other
one reads, `weights.npz` and `batch.npz`, and the weights by PyTorch's names, `torch.npz`.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import networks
import numpy as np
from networks import Work
from turns import Unavailable, serve

import densejax
from densejax import models, pretrained
from densejax.config import UserError
from densejax.inference.classifier import Classifier
from densejax.topology import hlo
from densejax.training import parallel
from densejax.weights import conversion
from densejax.weights.names import LAYOUTS


def draw(work: Work, directory: pathlib.Path) -> None:
    """Writes what all start from."""
    network, variables = densejax.create(work.model, work.num_classes, **work.fields)
    variables = jax.device_get(variables)
    np.savez(directory / "weights.npz", **conversion.flatten(variables))
    examples = work.examples()
    inputs = networks.preparation("float32").evaluation(examples["image"])
    np.savez(directory / "batch.npz", **examples, input=np.asarray(inputs))
    try:
        project = "timm" if work.model.startswith(("vovnet", "ese_vovnet", "rdnet")) else ""
        np.savez(directory / "torch.npz", **pretrained.to_torch(network, variables, project))
    except UserError as error:  # a network that PyTorch's projects do not have
        print(f"no weights by PyTorch's names: {error}", file=sys.stderr)


def read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(our variables, batch) as `draw` wrote them."""
    variables = conversion.unflatten(dict(np.load(directory / "weights.npz")))
    return variables, dict(np.load(directory / "batch.npz"))


def compiled(function: Callable, *arguments: Any) -> tuple[Callable, dict[str, Any]]:
    """A jitted function compiled for its arguments, and what that took."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    memory = program.memory_analysis()
    return program, {
        "compile_seconds": time.perf_counter() - start,
        "temp_bytes": memory and memory.temp_size_in_bytes,
        "moved_bytes": hlo.read(program.as_text())["bytes"],
    }


def training(work: Work, directory: pathlib.Path, name: str) -> tuple[dict, Callable]:
    """The training step of our network, or of the plain flax one, from the weights in a folder."""
    mesh = parallel.mesh()
    if name == "flax":
        step, state, batch = networks.plain_training(work, mesh)
    else:
        step, state, batch = networks.training(work, name, mesh)
    program, facts = compiled(step, state, batch)
    variables, arrays = read(directory)
    filled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    if name == "flax":
        filled = filled | networks.plain_variables(variables)
    else:
        filled = filled.replace(**variables)
    held = [jax.device_put(filled, jax.tree.map(lambda leaf: leaf.sharding, state))]
    arrays = jax.device_put({key: arrays[key] for key in batch}, parallel.split(mesh))

    def take_step():
        held[0], seen = program(held[0], arrays)
        return lambda: jax.block_until_ready(seen)

    seen = take_step()()
    check = {"loss": [float(seen if name == "flax" else seen["loss"] / seen["count"])]}
    # After one step the optimizer's memory is that step's gradient, weight decay added.
    memory = held[0]["optimizer"] if name == "flax" else held[0].opt_state
    check["gradient"] = norms([leaf for leaf in jax.tree.leaves(memory) if leaf.ndim])
    return facts | {"check": check}, take_step


def norms(arrays: Sequence[Any]) -> list[float]:
    """The L2 norm of each array, sorted: what no layout, name or order of arrays changes."""
    return sorted(float(np.linalg.norm(np.asarray(array, np.float64))) for array in arrays)


def ours(work: Work, variables: Mapping[str, Any], name: str) -> Callable:
    """What `densejax.predict` computes: (variables, uint8 images) -> float32 logits."""
    network = work.network(name).clone(batch_norm_axis=None)
    names = tuple(map(str, range(work.num_classes)))
    prepare = networks.preparation(work.dtype)
    return Classifier(network, variables, prepare, work.image_shape, names).logits


def inference(work: Work, directory: pathlib.Path, name: str) -> tuple[dict, Callable]:
    """Logits of our network, or of the plain flax one, with the weights in a folder."""
    variables, arrays = read(directory)
    if name == "flax":
        network = networks.plain_network(work)
        prepare = networks.preparation(work.dtype).evaluation
        variables = networks.plain_variables(variables)

        def logits(variables, images):
            return network.apply(variables, prepare(images), False)
    else:
        logits = ours(work, variables, name)
    variables, images = jax.device_put((variables, arrays["image"]))
    program, facts = compiled(jax.jit(logits), variables, images)

    def take_step():
        logits = program(variables, images)
        return lambda: jax.block_until_ready(logits)

    return facts | {"check": {"logits": np.asarray(take_step()())[0].tolist()}}, take_step


def keras_network(work: Work, variables: Mapping[str, Any]) -> Any:
    """Keras Applications' DenseNet in the sizes of our network, with our weights."""
    import keras
    from keras import layers

    network = work.network()
    if "depth" not in models.fields(work.model) or network.connect != "dense":
        raise Unavailable(f"the benchmark has no Keras form of {work.model}")

    def norm(x, name):
        x = layers.BatchNormalization(epsilon=network.batch_norm_epsilon, name=f"{name}_bn")(x)
        return layers.Activation("relu")(x)

    def conv(x, width, size, name, **rest):
        rest = {"padding": "same", "use_bias": network.convolution_bias} | rest
        return layers.Conv2D(width, size, name=f"{name}_conv", **rest)(x)

    widths = network.widths()
    x = inputs = keras.Input(work.image_shape)
    if network.stem == "imagenet":
        x = layers.ZeroPadding2D(3)(x)
        x = norm(conv(x, widths[0], 7, "conv1", strides=2, padding="valid"), "conv1")
        x = layers.MaxPooling2D(3, strides=2)(layers.ZeroPadding2D(1)(x))
    else:
        x = conv(x, widths[0], 3, "conv1")
    plan = zip(network.block_depths(), network.growth_rates(), strict=True)
    for block, (depth, growth_rate) in enumerate(plan, 1):
        for index in range(1, depth + 1):
            name, sizes = f"conv{block + 1}_block{index}", [(growth_rate, 3)]
            if network.bottleneck:
                sizes.insert(0, (network.bottleneck_width * growth_rate, 1))
            y = x
            for number, (width, size) in enumerate(sizes):
                y = norm(y, f"{name}_{number}")
                y = conv(y, width, size, f"{name}_{number + 1}")
            x = layers.Concatenate()([x, y])
        if block < len(widths):
            x = conv(norm(x, f"pool{block + 1}"), widths[block], 1, f"pool{block + 1}")
            x = layers.AveragePooling2D(2)(x)
    x = layers.BatchNormalization(epsilon=network.batch_norm_epsilon, name="bn")(x)
    x = layers.GlobalAveragePooling2D()(layers.Activation("relu")(x))
    made = keras.Model(inputs, layers.Dense(work.num_classes, name="predictions")(x))
    layout, flat = LAYOUTS["densenet"][1], conversion.flatten(variables)
    arrays = {layout.name(path): array for path, array in flat.items()}
    for variable in made.weights:
        variable.assign(arrays[variable.path])
    return made


def with_keras(work: Work, directory: pathlib.Path, is_training: bool) -> tuple[dict, Callable]:
    """Keras' train_on_batch or predict_on_batch; its weight decay is decoupled."""
    import keras

    variables, arrays = read(directory)
    network, settings = keras_network(work, variables), networks.recipe()
    images, labels = jnp.asarray(arrays["input"]), jnp.asarray(arrays["label"])
    network.compile(
        keras.optimizers.SGD(
            settings.learning_rate,
            settings.momentum,
            settings.nesterov,
            weight_decay=settings.weight_decay,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def train():
        return float(network.train_on_batch(images, labels))

    def classify():
        return network.predict_on_batch(images)

    def loss():
        network.reset_metrics()  # what it returns is the mean since then
        return train()

    decay = [settings.weight_decay * np.asarray(v) for v in network.trainable_variables]
    start = time.perf_counter()
    first = loss() if is_training else classify()
    facts = {"compile_seconds": time.perf_counter() - start}
    check = {"loss": [first]} if is_training else {"logits": first[0].tolist()}
    if is_training:  # its memory is the gradient times the negative rate, without the decay
        memory = [-np.asarray(v) / settings.learning_rate for v in network.optimizer.momentums]
        check["gradient"] = norms([m + d for m, d in zip(memory, decay, strict=True)])
    function = train if is_training else classify

    def take_step():
        found = function()
        return lambda: found

    return facts | {"check": check}, take_step


def build(spec: Mapping[str, Any]) -> tuple[dict[str, Any], Callable]:
    """From a specification (see compare.py) to facts and the function that takes one step."""
    work, directory = Work(**spec["work"]), pathlib.Path(spec["directory"])
    name, is_training = spec["implementation"], spec["mode"] == "train"
    if name == "draw":
        draw(work, directory)
        return {}, lambda: lambda: None
    versions = {"jax": jax.__version__, "flax": flax.__version__}
    if name == "keras":
        import keras

        versions["keras"] = keras.__version__
        facts, take_step = with_keras(work, directory, is_training)
    else:
        try:
            facts, take_step = (training if is_training else inference)(work, directory, name)
        except UserError as error:
            raise Unavailable(str(error)) from error
    if memory := jax.devices()[0].memory_stats():
        facts["peak_device_bytes"] = memory["peak_bytes_in_use"]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return facts | {"device": device, "versions": versions}, take_step


if __name__ == "__main__":
    serve(build)
