"""A network layer by layer: python -m densejax.summary --model=densenet121."""

import dataclasses
import json
from collections.abc import Mapping

import flax.linen as nn
from absl import flags

from densejax import command_line, models
from densejax.config import UserError
from densejax.models import counts
from densejax.models.connections import Graph
from densejax.runs import files, formats
from densejax.training import experiment

MODEL = flags.DEFINE_string("model", None, "A network's name; or give --config=CARD.")
IMAGE_SHAPE = flags.DEFINE_list(
    "image_shape",
    None,
    "height,width,channels. Default: the shape that the network is made for, such as 224,224,3.",
)
NUM_CLASSES = flags.DEFINE_integer(
    "num_classes",
    None,
    "The number of classes. 0: no classifier. Default: 1000 or 10, by the network.",
    lower_bound=0,
)
DEPTH = flags.DEFINE_integer(
    "depth",
    2,
    "How many parts of a layer's name are shown: 1 shows stages and blocks, 2 shows layers.",
    lower_bound=1,
)
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "How to print.")
FIGURE = flags.DEFINE_string(
    "figure", None, "The file (.png, .svg or .pdf) for a drawing of what each layer reads."
)
LIST = flags.DEFINE_bool("list", False, "Name every network.")


def named(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of the table and an image's shape, by the flags or as its paper has them."""
    fields = models.fields(name)
    usual, classes = models.usual_images(name)
    classes = classes if NUM_CLASSES.value is None else NUM_CLASSES.value
    try:
        shape = tuple(map(int, IMAGE_SHAPE.value or usual))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        given = ",".join(IMAGE_SHAPE.value)
        raise UserError(f"--image_shape={given}: give height,width,channels, such as 224,224,3")
    return models.create(fields, classes), shape


def chosen() -> tuple[nn.Module, tuple[int, ...]]:
    """The network and an image's shape that the flags ask for."""
    config = command_line.CONFIG.value
    if (config is None) == (MODEL.value is None):
        raise UserError("give --model=NAME (--list shows the names) or --config=CARD, one of both")
    if config is None:
        return named(MODEL.value)
    if IMAGE_SHAPE.value or NUM_CLASSES.value is not None:
        raise UserError("--config brings image_shape and num_classes with its data: leave them out")
    task = experiment.build(config).task
    return task.model, task.network_shape


def table(rows: list[counts.Layer]) -> str:
    """The rows as text, with shares of the totals, which are the last line."""
    parameters, multiply_adds = sum(r.parameters for r in rows), sum(r.multiply_adds for r in rows)
    total = counts.Layer("total", (), parameters, multiply_adds)
    lines = [("layer", "output", "parameters", "share", "multiply-adds", "share")]
    for row in [*rows, total]:
        line = [row.name, "x".join(map(str, row.output_shape or ()))]
        for field in ("parameters", "multiply_adds"):
            part, whole = getattr(row, field), getattr(total, field)
            line += [formats.count(part), formats.percent(part / max(whole, 1))]
        lines.append(line)
    return formats.table(lines, right=4)


def drawn(graph: Graph) -> str:
    """What each layer of a block reads, as text: a row for each reader, a column for each output.

    The last row is what follows the block.
    """
    readers = (*graph.reads, graph.emits)
    rows = [
        "".join(".#"[n in read] for n in range(min(row, len(graph.reads) + 1)))
        for row, read in enumerate(readers, 1)
    ]
    names = [*(f"layer{number}" for number in range(1, len(readers))), "end"]
    return "\n".join(f"  {name:8}{row}" for name, row in zip(names, rows, strict=True))


def _alike(graphs: Mapping[str, Graph]) -> dict[Graph, list[str]]:
    """The names of the blocks of each different graph; widths do not matter."""
    blocks = {}
    for name, graph in graphs.items():
        blocks.setdefault(dataclasses.replace(graph, widths=None), []).append(name)
    return blocks


def draw(graphs: Mapping[str, Graph]) -> None:
    """Writes the drawing that --figure asks for (raises UserError)."""
    from densejax.analysis import plots  # matplotlib may be missing

    if not graphs:
        raise UserError("--figure: this network says nothing of its connections")
    form = FIGURE.value.rpartition(".")[2].lower()
    if form not in ("png", "svg", "pdf"):
        raise UserError(f"--figure={FIGURE.value}: the name must end in .png, .svg or .pdf")
    panels = {", ".join(names): graph for graph, names in _alike(graphs).items()}
    with files.writing(f"--figure={FIGURE.value}", "name another file"):
        plots.save(plots.connections(panels), files.path_of("--figure", FIGURE.value), form)


def main() -> int:
    """Does what the flags say; returns the exit code."""
    if LIST.value:
        print("\n".join(models.MODELS))
        return 0
    model, image_shape = chosen()
    rows = counts.layers(model, image_shape, DEPTH.value)
    graphs = model.graphs() if hasattr(model, "graphs") else {}
    connections = dataclasses.asdict(counts.connections(graphs.values())) if graphs else {}
    traffic = counts.memory_access_cost(model, image_shape)
    if FIGURE.value:
        draw(graphs)
    if FORMAT.value == "table":
        print(table(rows))
        print(f"\nvalues that convolutions read and write: {formats.count(traffic)}")
        if graphs:
            print(
                "connections: {edges}; layers on a path from input to output: at most "
                "{longest_path}, {mean_path:.1f} on average".format(**connections)
            )
        for graph, names in _alike(graphs).items():
            print(f"{', '.join(names)}: the outputs, from the input on, that each layer reads")
            print(drawn(graph))
        return 0
    result = {
        "image_shape": image_shape,
        "num_classes": model.num_classes,
        "parameters": sum(row.parameters for row in rows),
        "multiply_adds": sum(row.multiply_adds for row in rows),
        "memory_access_cost": traffic,
        "connections": connections,
        "graphs": {name: dataclasses.asdict(graph) for name, graph in graphs.items()},
        "layers": [dataclasses.asdict(row) for row in rows],
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    command_line.run(main, config="optional")
