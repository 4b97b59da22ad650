"""Writes into docs/ what the code knows, and draws the pictures: python docs/generate.py.

Between the lines <!-- begin NAME --> and <!-- end NAME --> of a page stands what the function NAME
of `PARTS` returns. Everything else on a page is written by hand.
"""

import argparse
import contextlib
import csv
import dataclasses
import html
import importlib
import inspect
import itertools
import json
import os
import pathlib
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Arc, Rectangle
from PIL import Image

from densejax import config, models
from densejax.__main__ import COMMANDS
from densejax.analysis import plots
from densejax.data import official
from densejax.models import connections, counts
from densejax.runs import formats
from densejax.training import losses, optimizer

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "experiments" / "results"
IMAGES = DOCS / "images"

# Where a network's number of parameters is known from, beside its code here.
SOURCES = {
    "densenet_40_12": "paper, Table 2: 1.0M",
    "densenet_100_12": "paper, Table 2: 7.0M",
    "densenet_100_24": "paper: 27.2M, which only a stem of 16 channels gives",
    "densenet_b_100_12": "closed form",
    "densenet_c_40_12": "closed form",
    "densenet_bc_40_12": "imgclsmob",
    "densenet_bc_40_36": "imgclsmob; the authors' README: 1.5M",
    "densenet_bc_40_48": "imgclsmob; the authors' README: 2.7M",
    "densenet_bc_40_60": "imgclsmob; the authors' README: 4.3M",
    "densenet_bc_100_12": "imgclsmob; paper: 0.8M",
    "densenet_bc_190_40": "imgclsmob; paper: 25.6M",
    "densenet_bc_250_24": "imgclsmob; paper: 15.3M",
    "sparsenet_bc_100_24": "the authors' code: 1,461,124 with 100 classes",
    **dict.fromkeys(("densenet121", "densenet161", "densenet169", "densenet201"), "torchvision"),
    **dict.fromkeys(("densenet232", "densenet264", "densenet264_48"), "closed form"),
    "densenet_d2l": "closed form, with 1 channel at 96x96",
    "densenet_one_shot_40_20": "closed form; the published widths are not verified",
    "densenet_one_shot_40_27": "closed form; of all widths nearest to `densenet_40_12`",
    "densenet_one_shot_19_43": "closed form; the published widths are not verified",
    **{name: "torchvision" for name in models.MODELS if re.fullmatch(r"resnet\d+", name)},
    **{
        name: "paper, with its shortcut without parameters (option A)"
        for name in models.MODELS
        if re.fullmatch(r"resnet\d+_cifar", name)
    },
    "preact_resnet164": "closed form; DenseNet paper, Table 2: 1.7M",
    "preact_resnet1001": "closed form; DenseNet paper, Table 2: 10.2M",
    "plain18": "closed form",
    "plain34": "closed form",
    **{
        name: "the residual network of this depth, whose shortcuts have no parameters"
        for name in models.MODELS
        if re.fullmatch(r"plain\d+_cifar", name)
    },
    **dict.fromkeys(("vovnet27_slim", "vovnet39", "vovnet57"), "closed form of the authors' code"),
    **{name: "timm" for name in models.MODELS if name.startswith(("ese_vovnet", "rdnet"))},
    "rdnet_cifar": "ours; there is no second source",
    **{name: "the authors' code" for name in models.MODELS if name.startswith("hardnet")},
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[" ".join(cell.replace("|", r"\|").split()) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- Tables.


def cards() -> str:
    """The cards of configs/, by their docstrings."""
    rows = []
    for file in sorted((ROOT / "configs").glob("*.py")):
        card = importlib.import_module(f"configs.{file.stem}")
        title, _, rest = inspect.getdoc(card).partition("\n")
        expected = re.search(r"^Expected:\s+(.*?)(?=^\S|\Z)", rest, re.MULTILINE | re.DOTALL)
        arguments = inspect.signature(card.get_config) and inspect.getdoc(card.get_config)
        takes = re.search(r"may set (.*?)\.?$", arguments, re.DOTALL)
        rows.append(
            (f"[`{file.name}`](../../configs/{file.name})", title)
            + (takes[1] if takes else "nothing", expected[1] if expected else "")
        )
    return table(("Card", "What it is", "Arguments", "Expected result"), rows)


def patterns() -> str:
    """The patterns of both tables, by their docstrings."""
    parts = []
    for title, known in (
        ("### Patterns that concatenate (DenseNet)", connections.CONCATENATING),
        ("### Patterns that add (ResNet)", connections.ADDING),
    ):
        rows = []
        for name, function in known.items():
            options = [
                f"{option.name}={option.default}"
                for option in inspect.signature(function).parameters.values()
                if option.default is not option.empty
            ]
            rows.append((code_of(":".join([name, *options])), inspect.getdoc(function)))
        parts += [title, table(("`model.connect`", "Meaning"), rows)]
    return "\n\n".join(parts)


def of_experiments(name: str) -> types.ModuleType:
    """A module of experiments/, whose modules import each other by their names alone."""
    sys.path.insert(0, str(ROOT / "experiments"))
    return importlib.import_module(name)


def code_of(text: str) -> str:
    """Text as code."""
    return f"`{text}`"


def paragraph(thing: object) -> str:
    """The first paragraph of a docstring."""
    return inspect.getdoc(thing).partition("\n\n")[0]


def sweeps() -> str:
    """The sweeps of experiments/sweeps.py, by their docstrings."""
    found = of_experiments("sweeps").SWEEPS
    rows = [(code_of(name), paragraph(sweep)) for name, sweep in found.items()]
    return table(("Sweep", "What it varies"), rows)


def measured_patterns() -> str:
    """Step time and memory of every pattern, from the records."""
    titles = {
        "cifar": "DenseNet-40 (k = 12), 64 images of 32x32",
        "imagenet": "DenseNet-121, 8 images of 224x224",
    }
    parts = []
    for form, title in titles.items():
        record = json.loads((RESULTS / "patterns" / f"{form}.json").read_text())
        first, lines = record["rows"][0], []
        for row in record["rows"]:
            times = [1000 * seconds for seconds in row["seconds"]]
            time = 1000 * statistics.median(first["seconds"])
            lines.append(
                (
                    *(row["pattern"], {"in_place": "in place"}.get(row["block"], row["block"])),
                    *(formats.count(row["parameters"]), formats.si(row["multiply_adds"])),
                    f"{statistics.median(times):,.0f} ({min(times):,.0f} to {max(times):,.0f})",
                    f"{statistics.median(times) / time:.2f}",
                    f"{row['temp_bytes'] / 2**20:,.0f}",
                    f"{row['temp_bytes'] / first['temp_bytes']:.2f}",
                )
            )
        head = ("Pattern", "Computed", "Parameters", "Multiply-adds", "Step, ms", "Step / dense")
        lines = table((*head, "Memory, MiB", "Memory / dense"), lines)
        parts += [f"### {title}: medians of {record['rounds']} steps", lines]
    return "\n\n".join(parts).replace("| densejax |", "| adds |")


def measured_on_intel() -> str:
    """Seconds beside PyTorch on an Intel Xeon."""
    return measured("intel")


def measured_on_amd() -> str:
    """Seconds beside PyTorch on an AMD EPYC (Zen 3)."""
    return measured("amd_zen3")


def measured(processor: str) -> str:
    """Seconds beside PyTorch, from the text that experiments/benchmarks printed."""
    rows = []
    for file in sorted((RESULTS / "speed" / processor).glob("*.txt")):
        title, versions, _, *lines = file.read_text().splitlines()
        model, batch, what, *_ = title.split(", ")
        ours, theirs = (re.split(r"  +", line) for line in lines)
        times = [f"{cells[1]} ({cells[2]})" for cells in (ours, theirs)]
        name, devices = f"`{model}`", "2" if "2 x cpu" in versions else "1"
        what = {"train": "training step"}.get(what, what)
        memory = ours[-3]  # before the peak RSS and the seconds to compile
        rows.append((what, name, batch.split()[1], devices, *times, ours[3], memory))
    head = ("What", "Network", "Batch", "Devices", "Ours, s", "PyTorch, s", "Ours / PyTorch")
    return table((*head, "XLA's temporary memory, MiB"), rows)


def report_rows(part: str, sweep: str = "") -> list[dict[str, str]]:
    """The means of a report in a folder of RESULTS; with `sweep`, those of one sweep alone."""
    rows = csv.DictReader((RESULTS / part / "report.csv").read_text().splitlines())
    return [row for row in rows if sweep in ("", row["sweep"])]


def of_sweeps(
    part: str, axes: Sequence[str], titles: Sequence[str], by_name: bool = False, sweep: str = ""
) -> str:
    """The rows of `report_rows`, in their order or by name: axes and means."""
    names = {"growth_rate": "depth", "patterns_equal_parameters": "parameters"}
    rows = []
    for row in report_rows(part, sweep):
        shares, sizes = _shares_and_sizes(row)
        paths = row["edges"], row["longest_path"]
        equal = row.get("equal") or names.get(row["sweep"], "multiply-adds")
        row["equal"] = equal.replace("_", "-")
        row["kind"] = row.get("kind", "").replace("_", "-")
        rows.append((*(row[axis] for axis in axes), row["n"], *shares, *sizes, *map(_whole, paths)))
    rows = sorted(rows) if by_name else rows
    head = ("n", "Test accuracy, %", "Training accuracy, %", "Parameters", "Multiply-adds")
    return table((*titles, *head, "Edges", "Longest path"), rows)


def _shares_and_sizes(row: dict[str, str]) -> tuple[list[str], list[str]]:
    """Accuracies on test and training images; parameters and multiply-adds."""
    shares = [_share(row, name) for name in ("accuracy", "train_accuracy")]
    parameters, multiply_adds = (float(row[name]) for name in ("parameters", "multiply_adds"))
    return shares, [formats.count(int(parameters)), formats.si(multiply_adds)]


def _share(row: dict[str, str], name: str) -> str:
    width = row[f"{name}_interval"]  # of one seed there is none
    width = f" ± {100 * float(width):.2f}" if width else ""
    return f"{100 * float(row[name]):.2f}{width}"


def _whole(text: str) -> str:
    return str(int(float(text))) if text else "–"


def study_patterns() -> str:
    """Results of the connection study."""
    return of_sweeps("study_connections/study", ("equal", "kind"), ("Equal", "Pattern"))


def study_time() -> str:
    """Results of the connection study at equal training time."""
    folder = RESULTS / "study_connections" / "time"
    seconds = json.loads((folder / "training_time.json").read_text())["seconds"]
    runs = csv.DictReader((folder / "runs.csv").read_text().splitlines())
    steps = {run["kind"]: int(run["steps"]) for run in runs}
    rows = []
    for row in report_rows("study_connections/time"):
        kind = row["kind"]
        shares, sizes = _shares_and_sizes(row)
        step = f"{1000 * seconds[kind]:.0f}"
        rows.append((kind, row["n"], *shares, step, formats.count(steps[kind]), *sizes))
    head = ("Pattern", "n", "Test accuracy, %", "Training accuracy, %", "A step, ms", "Steps")
    return table((*head, "Parameters", "Multiply-adds"), rows)


def study_comparisons() -> str:
    """The comparisons that were written down before the runs, at equal multiply-adds."""
    report = (RESULTS / "study_connections" / "study" / "report.md").read_text()
    return re.search(r"^\| difference of .*?(?=\n\n)", report, re.DOTALL | re.MULTILINE)[0]


def study_depth() -> str:
    """Results of the connection study for two numbers of layers."""
    return of_sweeps(
        "study_connections/depth", ("kind", "blocks"), ("Pattern", "Layers of each block"), True
    )


def study_growth_rates() -> str:
    """Results of the growth-rate ablation."""
    return of_sweeps("study_connections/growth", ("equal", "growth_rate"), ("Equal", "k"))


def study_growth_schedule() -> str:
    """One growth rate for all blocks, or twice the rate in each block."""
    axes, titles = ("equal", "schedule"), ("Equal", "Growth rates")
    return of_sweeps("study_connections/shapes", axes, titles, True, "growth_schedule")


def study_depth_width() -> str:
    """Dense networks of equal parameters from shallow to deep, and two other kinds."""
    axes, titles = ("kind", "depth"), ("Kind", "Depth")
    return of_sweeps("study_connections/shapes", axes, titles, True, "depth_width")


def records() -> str:
    """The records: parameters, accuracy after the last stage, and seconds where these count."""
    rows = []
    for folder in sorted((ROOT / "experiments" / "records").glob("*/")):
        layouts = ("seed*/large/summary.json", "seed*/summary.json", "summary.json")
        files = next(found for layout in layouts if (found := sorted(folder.glob(layout))))
        results = [json.loads(file.read_text()) for file in files]
        accuracies = [100 * result["test_accuracy"] for result in results]
        accuracy, seconds = f"{statistics.mean(accuracies):.2f}", "–"
        if len(files) > 1:
            accuracy += f" ± {of_experiments('comparisons').half_width(accuracies):.2f}"
        if times := [json.loads(f.read_text())["seconds"] for f in folder.glob("seed*/time.json")]:
            seconds = f"{statistics.mean(times):.0f} ({min(times):.0f} to {max(times):.0f})"
        name = f"[{folder.name}](../experiments/records/{folder.name})"
        counted = formats.count(results[0]["parameters"]), str(len(files))
        device = f"{results[0]['device']}, JAX {results[0]['versions']['jax']}"
        rows.append((name, *counted, accuracy, seconds, device))
    head = ("Record", "Parameters", "n", "Test accuracy, %", "Seconds", "Device")
    return table(head, rows)


def laboratory(sweep: str, column: str, shown: Callable[[dict[str, str]], str]) -> str:
    """A short sweep of experiments/laboratory.sh: kinds of networks by the values of one axis."""
    rows = report_rows("laboratory", sweep)
    kinds, cells = {}, {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row[column])
        cells[row["kind"], row[column]] = shown(row)
    columns = [sorted(values, key=float) for values in kinds.values()]
    head = ["/".join(dict.fromkeys(values)) for values in zip(*columns, strict=True)]
    lines = [
        (kind, *(cells[kind, value] for value in sorted(values, key=float)))
        for kind, values in kinds.items()
    ]
    return table((f"n = {', '.join(sorted({row['n'] for row in rows}))}", *head), lines)


def laboratory_degradation() -> str:
    """Training errors of deeper networks, with and without shortcuts."""
    return laboratory("degradation", "depth", lambda row: _share(row, "train_error"))


def laboratory_train_size() -> str:
    """Test and training accuracy of networks that learn from few images."""

    def shown(row):
        return f"{_share(row, 'accuracy')} ({100 * float(row['train_accuracy']):.1f})"

    return laboratory("train_size", "train_size", shown)


def networks() -> str:
    """Every named network with its counts."""
    parts = []
    for family, names in itertools.groupby(models.MODELS, lambda n: models.MODELS[n]["family"]):
        rows = []
        for name in names:
            shape, classes = models.usual_images(name)
            network = models.create(models.fields(name), classes)
            parameters, multiply_adds = counts.of_network(network, shape)
            image = f"{'x'.join(map(str, shape))}, {classes:,} classes"
            row = formats.count(parameters), formats.si(multiply_adds), SOURCES[name]
            rows.append((f"`{name}`", image, *row))
        head = ("Name", "Image", "Parameters", "Multiply-adds", "The count equals")
        parts += [f"### {models.FAMILIES[family].__name__}", table(head, rows)]
    return "\n\n".join(parts)


def configuration() -> str:
    """Every key but those of the network, by section."""
    sections = {}
    for key, field in config.KEYS.items():
        sections.setdefault(key.rpartition(".")[0] or "the run", []).append((key, field))
    parts = []
    for section, keys in sections.items():
        rows = []
        for key, field in keys:
            words = field.allowed.words if field.allowed else ""
            rows.append((f"`{key}`", code_of(repr(field.default)), field.meaning, words))
        head = ("Key", "Default", "Meaning", "Allowed")
        parts += [f"### {section}", table(head, rows)]
    return "\n\n".join(parts)


def fields() -> str:
    """The keys of `config.model`, by family."""
    parts = []
    for name, family in models.FAMILIES.items():
        defaults = {field.name: field.default for field in dataclasses.fields(family)}
        rows = [
            (f"`model.{key}`", code_of(repr(defaults[key])), meaning)
            for key, meaning in models.meanings(name).items()
            if key != "family"
        ]
        head = ("Key", "Default", "Meaning")
        parts += [f"### {family.__name__}: `model.family = {name!r}`", table(head, rows)]
    return "\n\n".join(parts)


def names() -> str:
    """What the keys that name something may name."""
    found = {
        "data.name": official.SETS,
        "train.loss": losses.LOSSES,
        "optimizer.name": optimizer.OPTIMIZERS,
        "optimizer.schedule": optimizer.SCHEDULES,
        "model.family": models.FAMILIES,
    }
    rows = [(f"`{key}`", ", ".join(map(code_of, known))) for key, known in found.items()]
    return table(("Key", "Names"), rows)


def shortcuts() -> str:
    """What the command `densejax` stands for."""
    rows = [
        (f"`densejax {name}`", f"`{' '.join([f'python -m densejax.{module}', *flags])}`", does)
        for name, (module, flags, does) in COMMANDS.items()
    ]
    return table(("Short", "The same as", "What it does"), rows)


def commands() -> str:
    """What `--help` of every command of the package says."""
    files = sorted((ROOT / "densejax").glob("*.py"), key=lambda file: (file.stem != "main", file))
    found = [file.stem for file in files if "command_line.run(" in file.read_text()]
    return helped({f"python -m densejax.{name}": ["-m", f"densejax.{name}"] for name in found})


def scripts() -> str:
    """What `--help` of every script of experiments/ says, first of those that most people use."""
    folders, first = (ROOT / "experiments", ROOT / "experiments" / "benchmarks"), ("run", "report")
    files = [ROOT / "experiments" / f"{name}.py" for name in first]
    files += [f for folder in folders for f in sorted(folder.glob("*.py")) if f not in files]
    found = [
        str(file.relative_to(ROOT))
        for file in files
        if re.search(r"^    (script|command_line)\.run\(", file.read_text(), re.MULTILINE)
    ]
    return helped({f"python {name}": [name] for name in found})


def helped(commands: dict[str, list[str]]) -> str:
    """What commands say of themselves, by how they are typed."""
    parts = []
    for typed, words in commands.items():
        result = subprocess.run(
            [sys.executable, *words, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "100"},
        )
        text = "\n".join(map(str.rstrip, result.stdout.strip().splitlines()))
        parts += [f"### `{typed}`", f"```text\n{text}\n```"]
    return "\n\n".join(parts)


PARTS = {
    function.__name__: function
    for function in (
        *(cards, patterns, networks, configuration, fields, names, sweeps),
        *(measured_patterns, measured_on_intel, measured_on_amd),
        *(study_patterns, study_comparisons, study_time, study_depth, study_growth_rates),
        *(study_growth_schedule, study_depth_width, laboratory_degradation, laboratory_train_size),
        *(records, shortcuts, commands, scripts),
    )
}
SLOW = ("networks", "commands", "scripts")  # seconds to minutes


def filled(text: str, parts: dict[str, Callable[[], str]]) -> str:
    """A page with its generated parts made anew, those of `parts`."""

    def fill(match):
        name = match["name"]
        made = parts[name]() if name in parts else match["old"]
        return f"<!-- begin {name} -->\n{made}\n<!-- end {name} -->"

    pattern = r"<!-- begin (?P<name>\w+) -->\n(?P<old>.*?)\n?<!-- end (?P=name) -->"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def pages() -> list[pathlib.Path]:
    """All pages of docs/."""
    return sorted(DOCS.rglob("*.md"))


# --- Pictures.


def draw_patterns() -> None:
    """What each layer of a block of six reads, for each pattern that concatenates."""
    graphs = {name: connections.graph(name, 6, 12) for name in connections.CONCATENATING}
    rows = []
    for number, names in enumerate((list(graphs)[:4], list(graphs)[4:])):
        figure = plots.connections({name.replace("_", "-"): graphs[name] for name in names})
        figure.set_size_inches(2.3 * len(names), 1.9)
        plots.save(figure, IMAGES / f"row{number}.png")
        rows.append(Image.open(IMAGES / f"row{number}.png").convert("RGB"))
        (IMAGES / f"row{number}.png").unlink()
    sheet = Image.new(
        "RGB", (max(r.width for r in rows), sum(r.height + 20 for r in rows)), "white"
    )
    top = 0
    for row in rows:
        sheet.paste(row, ((sheet.width - row.width) // 2, top))
        top += row.height + 20
    sheet.save(IMAGES / "patterns.png", optimize=True)


def draw_dense_block() -> Figure:
    """A block of four layers: who reads whom, and of how many maps what each reads consists."""
    figure, (axes,) = plots.figure(width=7.2, height=4.4)
    sources = {"input": 24, "layer 1": 12, "layer 2": 12, "layer 3": 12, "layer 4": 12}
    readers = ("layer 1", "layer 2", "layer 3", "layer 4", "transition")
    axes.axis("off")
    for number, reader in enumerate(readers, 1):
        bottom = 0
        for source, (name, width) in enumerate(list(sources.items())[:number]):
            color = plots.COLORS[source]
            height = width / 24
            axes.add_patch(Rectangle((number - 0.3, bottom), 0.6, height, color=color, alpha=0.85))
            label = axes.text(number, bottom + height / 2, name, ha="center", va="center")
            label.set(color="white", fontsize=8)
            bottom += height
            distance = number - source
            arc = Arc(((number + source) / 2, 3.75), distance, 0.5 * distance, theta2=180)
            axes.add_patch(arc).set(color=color, linewidth=1.5)
        total = sum(list(sources.values())[:number])
        axes.text(number, bottom + 0.08, f"reads {total}", ha="center", fontsize=8)
        axes.text(number, 3.55, reader, ha="center", fontsize=9)
    axes.text(0, 3.55, "input", ha="center", fontsize=9)
    axes.plot(range(6), [3.75] * 6, "o", color=plots.INK)
    axes.text(0, 0.9, "What each layer\nreads, in feature\nmaps (k = 12)", ha="center", fontsize=8)
    axes.set(xlim=(-0.6, 5.5), ylim=(-0.05, 5.15))
    return figure


def draw_architecture() -> Figure:
    """The stages of DenseNet-BC-100-12: height and width are those of the feature maps."""
    model = models.create(models.fields("densenet_bc_100_12"), 10)
    figure, (axes,) = plots.figure(width=8.2, height=3.0)
    axes.axis("off")
    left = 0.0
    for layer in counts.layers(model, (32, 32, 3), depth=1):
        if layer.name == "norm":  # of the last block's shape
            continue
        *pixels, channels = layer.output_shape
        size = pixels[0] if pixels else 1
        color = plots.COLORS[0 if layer.name.startswith("block") else 6]
        width = max(channels / 60, 0.7)
        axes.add_patch(Rectangle((left, -size / 2), width, size, color=color, alpha=0.85))
        shape = "x".join(map(str, layer.output_shape))
        text = f"{layer.name}\n{shape}"
        axes.text(left + width / 2, -18, text, va="top", ha="center", fontsize=8)
        left += width + 1.6
    axes.set(xlim=(-0.8, left), ylim=(-27, 17))
    return figure


def draw_terminal() -> None:
    """A run of the digits in a terminal of 80 columns, as SVG; grey is what is overwritten."""
    command, output = "python -m densejax.main --config=configs/digits.py", b""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(ROOT / "configs", f"{folder}/configs")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
        terminal, its_end = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), its_end)
        words = [sys.executable, *command.split()[1:]]
        with subprocess.Popen(words, cwd=folder, env=environment, **streams):
            os.close(its_end)
            with contextlib.suppress(OSError):  # which Linux raises when the command has ended
                while part := os.read(terminal, 4096):
                    output += part
        os.close(terminal)
    rows = [("#e6e6e6", f"$ {command}")]
    for line in output.decode().replace("\r\n", "\n").rstrip().split("\n"):
        *before, last = filter(None, re.split(r"[\r\x1b]+(?:\[K)?", line))
        for word in ("compiling", "step"):
            shown = [text for text in before if text.startswith(word)]
            rows += [("#9a9a9a", text) for text in shown[len(shown) // 2 :][:1]]
        rows.append(("#e6e6e6", last))
    texts = [
        f'<text x="12" y="{20 * number + 26}" fill="{color}">{html.escape(text)}</text>'
        for number, (color, text) in enumerate(rows)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{20 * len(rows) + 20}" '
    head += 'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" '
    head += 'xml:space="preserve"><rect width="100%" height="100%" rx="8" fill="#1e1e1e"/>'
    (IMAGES / "terminal.svg").write_text("\n".join([head, *texts, "</svg>\n"]))


def main() -> None:
    """Writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [*PARTS, "pictures", "terminal"]
    parser.add_argument("--only", nargs="*", choices=everything, help="default: all")
    chosen = parser.parse_args().only or everything
    parts = {name: PARTS[name] for name in chosen if name in PARTS}
    for page in pages():
        page.write_text(filled(page.read_text(), parts))
    if "pictures" in chosen:
        IMAGES.mkdir(exist_ok=True)
        draw_patterns()
        for draw in (draw_dense_block, draw_architecture):
            plots.save(draw(), IMAGES / f"{draw.__name__.removeprefix('draw_')}.png")
    if "terminal" in chosen:
        draw_terminal()


if __name__ == "__main__":
    main()
