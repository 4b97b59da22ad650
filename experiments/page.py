"""The page of experiments/report.py: tables, figures, and where every number comes from.

Sweeps and runs are those of experiments/report.py.
"""

import base64
import html
import json
import math
import re
import string
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import figures
from etils import epath
from figures import say
from matplotlib.figure import Figure
from sweeps import SWEEPS, differences

from densejax.analysis import plots
from densejax.config import default, flatten
from densejax.runs import formats

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
        return lambda group: cell(group.axes.get(name))  # escapes it

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

    splits = sorted({group.split for group in groups})
    columns: dict[str, Callable[[Any], str]] = {
        **{name.replace("_", " "): axis(name) for name in groups[0].axes},
        **({} if "kind" in groups[0].axes else {"network": lambda group: cell(group.kind)}),
        "n": lambda group: cell(len(group.runs)),
        **{f"{split} accuracy (%)": points(f"{split}_accuracy") for split in splits},
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
    return sortable(columns, ([column(group) for column in columns.values()] for group in groups))


def sortable(names: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that a click on a column's head sorts, of rows of `cell`."""
    rows = map("".join, rows)
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(name)}</button></th>' for name in names
    )
    return (
        '<div class="scrolls" tabindex="0" role="region" aria-label="results"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>"
        f"{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>"
    )


def drawn(name: str, drawings: Iterable[tuple[str, str, Figure]], folder: epath.Path) -> str:
    """Figures of (file name, caption, figure) as elements; writes them as PNG too."""
    elements = []
    for file, caption, drawing in drawings:
        # A name may hold anything, a "/" too; the figure stays in the folder.
        plots.save(drawing, folder / re.sub(r"[^\w.-]", "_", f"{name}_{file}.png"))
        caption = html.escape(caption)
        svg = plots.svg(drawing, caption)
        elements.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    return "".join(elements)


def assessed(name: str, run: Any, folder: epath.Path) -> str:
    """What `python -m densejax.assess` found of a run, folded; writes its figures."""
    found, picture = run.assessment, run.path / "assessment" / "mistakes.png"
    told = f"accuracy {formats.percent(found['accuracy'])}"
    told += f", calibration error {formats.percent(found['calibration_error'])}"
    pictures = drawn(name, figures.of_assessment(run), folder)
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        pictures += f'<figure><img src="data:image/png;base64,{data}" alt="mistakes"></figure>'
    rows = (
        [cell(one, one), *(cell(x, f"{100 * x:.2f}" if x else "") for x in scores)]
        for one, *scores in zip(*found["classes"].values(), strict=True)
    )
    columns = ("class", "precision (%)", "recall (%)", "F1 (%)")
    return (
        f"<details><summary>{html.escape(f'{run.name}: {told}')}</summary>"
        f'<div class="wide">{pictures}</div>{sortable(columns, rows)}</details>'
    )


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
        versions = " ".join(f"{name} {version}" for name, version in run.versions.items())
        parts.append(
            f"<details><summary>{html.escape(f'{run.name}: {run.state}')}</summary>"
            f"<pre><code>{html.escape(run.sweep['command'])}</code></pre>"
            f"<p>This run: {listed({key: values[key] for key in own & values.keys()})}</p>"
            f'<p class="quiet">{html.escape(run.start["devices"])}; {html.escape(versions)}</p>'
            "</details>"
        )
    summary = "<summary>Commands, configurations and versions</summary>"
    return f"<details>{summary}{''.join(parts)}</details>"


def one_version(groups: dict[str, Any]) -> str:
    """A paragraph that says which of some named groups are of which code; "" where all are of one.

    Data and weights are left out: few images, or another network, have their own.
    """
    known = {
        name: {key: group.versions[key] for key in group.versions.keys() - {"data", "weights"}}
        for name, group in groups.items()
    }
    others = differences(known)
    return f"<p>Not all of these are of one version: {html.escape(others)}.</p>" if others else ""


def section(name: str, runs: Sequence[Any], groups: Sequence[Any], folder: epath.Path) -> str:
    """A sweep's part of the page; writes its figures."""
    left = [run for run in runs if not run.result]
    question = SWEEPS[name].__doc__.splitlines()[0].replace("*", "") if name in SWEEPS else ""
    parts = [
        f'<section id="{html.escape(name)}"><h2>{html.escape(name.replace("_", " "))}</h2>'
        f"<p>{html.escape(question)}</p>",
        f'<p class="quiet">{len(runs) - len(left)} of {len(runs)} runs have ended.</p>',
    ]
    if groups:
        parts.append(one_version({group.label(): group for group in groups}))
        parts.append(table(groups))
        parts.append(f'<div class="figures">{drawn(name, figures.of_sweep(groups), folder)}</div>')
    if maps := drawn(name, figures.heat_maps(groups), folder):
        parts.append(
            "<details><summary>Feature reuse: what each layer reads</summary><p>Mean |weight| of "
            "the first convolution that reads a source's feature maps, over its column's largest; "
            f'a box marks what stands behind the block.</p><div class="wide">{maps}</div></details>'
        )
    if seen := [assessed(name, run, folder) for run in runs if run.assessment]:
        summary = "<summary>Classes, calibration and mistakes of each run</summary>"
        parts.append(f"<details>{summary}{''.join(seen)}</details>")
    if left:
        items = (f"<li>{html.escape(f'{run.name}: {run.state}')}</li>" for run in left)
        parts.append(f"<p>Not ended or damaged, in no mean:</p><ul>{''.join(items)}</ul>")
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
    links = "".join(
        f'<a href="#{urllib.parse.quote(name)}">{html.escape(name.replace("_", " "))}</a>'
        for name in sweeps
    )
    parts = [f"<nav>{links}</nav>"]
    if networks := drawn("all", figures.of_all(groups), folder):
        named = {f"{name}, {one.label()}": one for name in groups for one in groups[name]}
        parts.append(f"<section><h2>All networks</h2>{one_version(named)}")
        parts.append(f'<div class="figures">{networks}</div></section>')
    parts += [section(name, runs, groups[name], folder) for name, runs in sweeps.items()]
    template = string.Template(TEMPLATE.read_text())
    return template.substitute(title=html.escape(title), body="".join(parts))
