"""The page of experiments/report.py: tables, figures, and where every number comes from.

Sweeps and runs are those of experiments/report.py.
"""

import html
import json
import math
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import figures
from etils import epath
from figures import say
from matplotlib.figure import Figure
from sweeps import SWEEPS

from densejax import formats
from densejax.analysis import plots
from densejax.config import default, flatten

TEMPLATE = epath.Path(__file__).parent / "report.html"


def cell(value: Any, text: str = "") -> str:
    """A table's cell: the value that it is sorted by, and what it shows."""
    missing = value is None or value != value
    kind = "" if isinstance(value, str | bool) else ' class="number"'
    shown, sorts = ("–", "") if missing else (text or say(value), str(value))
    return f'<td{kind} data-value="{html.escape(sorts)}">{html.escape(shown)}</td>'


def table(groups: Sequence[Any]) -> str:
    """The sortable table of a sweep's groups."""

    def axis(name):
        return lambda group: cell(group.axes.get(name))

    def points(quantity):
        def show(group):
            mean, spread = 100 * group.mean(quantity), 100 * group.deviation(quantity)
            return cell(mean, f"{mean:.2f}" + (f" ± {spread:.2f}" if spread == spread else ""))

        return show

    def number(quantity, form):
        def show(group):
            mean = group.mean(quantity)
            return cell(mean, "" if math.isnan(mean) else form(mean))

        return show

    def whole(number):
        return formats.count(round(number))

    def milliseconds(seconds):
        return f"{1000 * seconds:.3g}"

    columns: dict[str, Callable[[Any], str]] = {
        **{name.replace("_", " "): axis(name) for name in groups[0].axes},
        **({} if "kind" in groups[0].axes else {"network": lambda group: cell(group.kind)}),
        "n": lambda group: cell(len(group.runs)),
        "accuracy (%)": points("accuracy"),
        "training (%)": points("train_accuracy"),
        "gap (points)": points("gap"),
        "parameters": number("parameters", whole),
        "multiply-adds": number("multiply_adds", formats.si),
        "training FLOP": number("training_compute", formats.si),
        "images/s": number("images_per_second", whole),
    }
    if any(group.values("latency_1") for group in groups):
        for images in (1, 64):
            columns[f"{images} (ms)"] = number(f"latency_{images}", milliseconds)
    head = "".join(f'<th scope="col"><button type="button">{n}</button></th>' for n in columns)
    rows = ("".join(column(group) for column in columns.values()) for group in groups)
    return (
        '<div class="scrolls" tabindex="0" role="region" aria-label="results"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>"
        f"{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>"
    )


def drawn(name: str, drawings: Iterable[tuple[str, str, Figure]], folder: epath.Path) -> str:
    """Figures of (file name, caption, figure) as elements; writes them as PNG too."""
    elements = []
    for file, caption, drawing in drawings:
        plots.save(drawing, folder / f"{name}_{file}.png")
        caption = html.escape(caption)
        svg = plots.svg(drawing, caption)
        elements.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    return "".join(elements)


def listed(values: dict[str, Any]) -> str:
    """Keys of a configuration and their values."""
    pairs = (f"{key}={json.dumps(value)}" for key, value in sorted(values.items()))
    return f"<code>{html.escape(', '.join(pairs)) or 'nothing'}</code>"


def provenance(runs: Sequence[Any]) -> str:
    """Each run's command, what of its configuration is its own, and its versions."""
    known = flatten(json.loads(default().to_json()))  # a tuple is a list in config.json too
    flat = [flatten(run.config) for run in runs]
    keys, whole = set().union(*flat), [values for values in flat if values]
    own = {key for key in keys if len({json.dumps(values.get(key)) for values in whole}) > 1}
    changed = {
        key: whole[0][key] for key in keys - own if whole[0][key] != known.get(key, whole[0])
    }
    parts = [f"<p>All runs, beside the defaults: {listed(changed)}</p>"]
    for run, values in zip(runs, flat, strict=True):
        versions = " ".join(f"{name} {version}" for name, version in run.start["versions"].items())
        parts.append(
            f"<details><summary>{html.escape(run.sweep['run'])}: {run.state}</summary>"
            f"<pre><code>{html.escape(run.sweep['command'])}</code></pre>"
            f"<p>This run: {listed({key: values[key] for key in own & values.keys()})}</p>"
            f'<p class="quiet">{html.escape(run.start["devices"])}; {html.escape(versions)}</p>'
            "</details>"
        )
    summary = "<summary>Commands, configurations and versions</summary>"
    return f"<details>{summary}{''.join(parts)}</details>"


def section(name: str, runs: Sequence[Any], groups: Sequence[Any], folder: epath.Path) -> str:
    """A sweep's part of the page; writes its figures."""
    left = [run for run in runs if not run.result]
    question = SWEEPS[name].__doc__.splitlines()[0].replace("*", "") if name in SWEEPS else ""
    parts = [
        f'<section id="{name}"><h2>{name.replace("_", " ")}</h2><p>{html.escape(question)}</p>',
        f'<p class="quiet">{len(runs) - len(left)} of {len(runs)} runs have ended.</p>',
    ]
    if groups:
        parts.append(table(groups))
        parts.append(f'<div class="figures">{drawn(name, figures.of_sweep(groups), folder)}</div>')
    if maps := drawn(name, figures.heat_maps(groups), folder):
        parts.append(
            "<details><summary>Feature reuse: what each layer reads</summary><p>Mean |weight| of "
            "the first convolution that reads a source's feature maps, over its column's largest; "
            f'a box marks what stands behind the block.</p><div class="wide">{maps}</div></details>'
        )
    if left:
        items = (f"<li>{html.escape(run.sweep['run'])}: {run.state}</li>" for run in left)
        parts.append(f"<p>Not ended, in no mean:</p><ul>{''.join(items)}</ul>")
    return "".join([*parts, provenance(runs), "</section>"])


def of(
    sweeps: dict[str, list[Any]], groups: dict[str, list[Any]], title: str, folder: epath.Path
) -> str:
    """The whole page; writes its figures.

    Args:
      sweeps: runs by sweep.
      groups: those that have ended, together where they differ in their seed alone.
      title: of the page.
      folder: for the figures as PNG.
    """
    links = "".join(f'<a href="#{name}">{name.replace("_", " ")}</a>' for name in sweeps)
    parts = [f"<nav>{links}</nav>"]
    if networks := drawn("all", figures.of_all(groups), folder):
        parts.append(
            f'<section><h2>All networks</h2><div class="figures">{networks}</div></section>'
        )
    parts += [section(name, runs, groups[name], folder) for name, runs in sweeps.items()]
    template = string.Template(TEMPLATE.read_text())
    return template.substitute(title=html.escape(title), body="".join(parts))
