"""The page of experiments/report.py: tables, figures, and where every number comes from."""

import base64
import dataclasses
import html
import json
import re
import string
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import figures
from comparisons import FEWEST, LEVEL, compare
from etils import epath
from matplotlib.figure import Figure
from sweep_runs import Group, Run, say
from sweeps import SWEEPS, differences

from densejax.analysis import plots
from densejax.config import default, flatten
from densejax.runs import formats

TEMPLATE = epath.Path(__file__).parent / "report.html"
INTERVAL = "± 95 % interval"
NOTE = (
    f'"better" and "worse" are written where p, by Holm for all comparisons of the sweep that were '
    f"written down before the runs, is below {LEVEL}, with {FEWEST} seeds or more that both have."
)


@dataclasses.dataclass(frozen=True)
class Files:
    """Where figures are written, and as what."""

    folder: epath.Path
    formats: Sequence[str] = ("png",)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: its columns' names, rows of (value to sort by, text), and the row that is best."""

    head: list[str]
    rows: list[list[tuple[Any, str]]]
    best: int | None = None

    def markdown(self) -> str:
        """As Markdown; the best row is bold."""
        lines = [self.head, ["---"] * len(self.head)]
        for number, row in enumerate(self.rows):
            texts = [text.replace("|", "\\|").replace("<", "&lt;") for _, text in row]
            lines.append([f"**{text}**" for text in texts] if number == self.best else texts)
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def html(self) -> str:
        """As a sortable table."""
        head = "".join(
            f'<th scope="col"><button type="button">{html.escape(name)}</button></th>'
            for name in self.head
        )
        body = ""
        for number, row in enumerate(self.rows):
            best = ' class="best"' if number == self.best else ""
            body += f"<tr{best}>{''.join(cell(*pair) for pair in row)}</tr>"
        return (
            '<div class="scrolls" tabindex="0" role="region" aria-label="results"><table>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )


def cell(value: Any, text: str) -> str:
    """A table's cell: the value that it is sorted by, and what it shows."""
    kind = "" if isinstance(value, str | bool) else ' class="number"'
    sorts = "" if text == "–" else str(value)
    return f'<td{kind} data-value="{html.escape(sorts)}">{html.escape(text)}</td>'


def shown(value: Any, form: Callable[[Any], str] = say) -> tuple[Any, str]:
    """A value and its text; a dash for None and NaN."""
    return value, "–" if value is None or value != value else form(value)


def spread(mean: float, half: float, form: str = "{:.2f}") -> tuple[float, str]:
    """A mean and its text with an interval, if there is one."""
    return shown(mean, lambda mean: form.format(mean) + (f" ± {half:.2f}" if half == half else ""))


def table(groups: Sequence[Group]) -> Table:
    """The table of a sweep's groups."""

    def points(quantity):
        return lambda group: spread(100 * group.mean(quantity), 100 * group.half_width(quantity))

    def number(quantity, form):
        return lambda group: shown(group.mean(quantity), form)

    def whole(number):
        return formats.count(round(number))

    def milliseconds(seconds):
        return f"{1000 * seconds:.3g}"

    def share(mismatch):
        return f"{100 * mismatch:+.2f}"

    splits = sorted({group.split for group in groups})
    columns: dict[str, Callable[[Group], tuple[Any, str]]] = {
        **{
            name.replace("_", " "): lambda group, name=name: shown(group.axes.get(name))
            for name in groups[0].axes
        },
        **({} if "kind" in groups[0].axes else {"network": lambda group: shown(group.kind)}),
        "n": lambda group: shown(len(group.runs)),
        **{f"{split} accuracy (%) {INTERVAL}": points(f"{split}_accuracy") for split in splits},
        f"training accuracy (%) {INTERVAL}": points("train_accuracy"),
        f"gap (points) {INTERVAL}": points("gap"),
        "parameters": number("parameters", whole),
        "multiply-adds": number("multiply_adds", formats.si),
        "mismatch (%)": lambda group: shown(group.sweep.get("mismatch"), share),
        "edges": number("edges", whole),
        "longest path": number("longest_path", whole),
        "mean path": number("mean_path", "{:.1f}".format),
        "training FLOP": number("training_compute", formats.si),
        "images/s": number("images_per_second", whole),
        "1 (ms)": number("latency_1", milliseconds),
        "64 (ms)": number("latency_64", milliseconds),
    }
    optional = ("mismatch (%)", "edges", "longest path", "mean path", "1 (ms)", "64 (ms)")
    for name in optional:
        if all(columns[name](group)[1] == "–" for group in groups):
            del columns[name]
    rows = [[column(group) for column in columns.values()] for group in groups]
    best = min(range(len(groups)), key=lambda n: groups[n].mean("error"))
    return Table(list(columns), rows, best if len(groups) > 1 and len(splits) == 1 else None)


def table_of_comparisons(sweep: str, groups: Sequence[Group]) -> Table | None:
    """The comparisons that were written down; None if there are none, or none is possible yet."""
    head = ["difference of", "n", f"accuracy (points) {INTERVAL}", "p (paired t test)"]
    head += ["p (sign flips, exact)", "p (t test, by Holm)", "first against second"]
    rows = []

    def small(p):
        return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"

    for one in compare(sweep, groups):
        ps = [shown(p, small) for p in (one.t, one.flips, one.corrected)]
        points = spread(one.difference, one.interval, "{:+.2f}")
        rows.append([shown(one.name, str), shown(one.n), points, *ps, shown(one.conclusion, str)])
    return Table(head, rows) if rows else None


def facts(groups: Sequence[Group]) -> str:
    """The data, epochs, devices, dates and code of the runs of some groups, in one line."""
    found = {"data": set(), "epochs": set(), "device": set(), "date": set(), "code": set()}
    for run in (run for group in groups for run in group.runs):
        data = run.config["data"]
        size = f" at {data['image_size']}x{data['image_size']}" if data.get("image_size") else ""
        found["data"].add(f"{data['name']}{size}, {run.split} images")
        if limit := data.get("train_size"):
            found.setdefault("training images", set()).add(limit)
        found["epochs"].add(run.config["train"]["epochs"])
        if limit := run.config["train"].get("max_steps"):
            found.setdefault("steps at most", set()).add(limit)
        found["device"].add(run.result.get("device") or run.start["devices"])
        found["date"].add(run.start.get("time", "not recorded").partition("T")[0])
        found["code"].add(run.versions.get("code", "not recorded"))
    return "; ".join(
        f"{name}: {', '.join(map(str, sorted(values)))}" for name, values in found.items()
    )


def question(name: str) -> str:
    """What a sweep asks: the first line of its docstring."""
    made = SWEEPS.get(name.partition("_x_")[0])
    return made.__doc__.splitlines()[0].replace("*", "") if made else ""


def markdown(sweeps: dict[str, list[Run]], groups: dict[str, list[Group]]) -> str:
    """The tables of all sweeps as Markdown; names come from folders, so they are escaped."""
    parts = ["# Sweeps\n"]
    for name in sweeps:
        parts.append(f"## {html.escape(say(name))}\n\n{question(name)}\n")
        if groups[name]:
            parts.append(f"{html.escape(facts(groups[name]))}\n")
            parts.append(table(groups[name]).markdown())
            if compared := table_of_comparisons(name, groups[name]):
                parts.append(f"{compared.markdown()}\n{NOTE}\n")
    return "\n".join(parts)


def drawn(name: str, drawings: Iterable[tuple[str, str, Figure]], files: Files) -> str:
    """Figures of (file name, caption, figure) as elements; writes them as files too."""
    elements = []
    for file, caption, drawing in drawings:
        # A name may hold anything, a "/" too; the figure stays in the folder.
        for form in files.formats:
            plots.save(
                drawing, files.folder / re.sub(r"[^\w.-]", "_", f"{name}_{file}.{form}"), form
            )
        caption = html.escape(caption)
        svg = plots.svg(drawing, caption)
        elements.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    return "".join(elements)


def assessed(name: str, run: Run, files: Files) -> str:
    """What `python -m densejax.assess` found of a run, folded; writes its figures."""
    found, picture = run.assessment, run.path / "assessment" / "mistakes.png"
    told = f"accuracy {formats.percent(found['accuracy'])}"
    told += f", calibration error {formats.percent(found['calibration_error'])}"
    pictures = drawn(name, figures.of_assessment(run), files)
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        pictures += f'<figure><img src="data:image/png;base64,{data}" alt="mistakes"></figure>'
    rows = [
        [shown(one, str), *(shown(x, lambda x: f"{100 * x:.2f}") for x in scores)]
        for one, *scores in zip(*found["classes"].values(), strict=True)
    ]
    scored = Table(["class", "precision (%)", "recall (%)", "F1 (%)"], rows)
    return (
        f"<details><summary>{html.escape(f'{run.name}: {told}')}</summary>"
        f'<div class="wide">{pictures}</div>{scored.html()}</details>'
    )


def listed(values: dict[str, Any]) -> str:
    """Keys of a configuration and their values."""
    pairs = (f"{key}={json.dumps(value)}" for key, value in sorted(values.items()))
    return f"<code>{html.escape(', '.join(pairs)) or 'nothing'}</code>"


def provenance(runs: Sequence[Run]) -> str:
    """Each run's command, the part of its configuration that is its own, and its versions."""
    known = flatten(json.loads(default().to_json()))  # a tuple is a list in config.json too
    flat = [flatten(run.config) for run in runs]
    keys, whole = set().union(*flat), [values for values in flat if values]
    own = {key for key in keys if len({json.dumps(values.get(key)) for values in whole}) > 1}
    shared = {key: whole[0].get(key) for key in keys - own}
    changed = {k: v for k, v in shared.items() if k not in known or known[k] != v}
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


def one_version(groups: dict[str, Group]) -> str:
    """A paragraph that says which named groups have which versions; "" if all have the same.

    Data and weights are left out: a run with fewer images, or another network, has its own.
    """
    known = {
        name: {key: group.versions[key] for key in group.versions.keys() - {"data", "weights"}}
        for name, group in groups.items()
    }
    others = differences(known)
    return f"<p>Not all of these are of one version: {html.escape(others)}.</p>" if others else ""


def section(name: str, runs: Sequence[Run], groups: Sequence[Group], files: Files) -> str:
    """A sweep's part of the page; writes its figures."""
    left = [run for run in runs if not run.result]
    parts = [
        f'<section id="{html.escape(name)}"><h2>{html.escape(name.replace("_", " "))}</h2>'
        f"<p>{html.escape(question(name))}</p>",
        f'<p class="quiet">{len(runs) - len(left)} of {len(runs)} runs have ended.</p>',
    ]
    if groups:
        parts.append(one_version({group.label(): group for group in groups}))
        parts.append(f'<p class="quiet">{html.escape(facts(groups))}</p>{table(groups).html()}')
        if compared := table_of_comparisons(name, groups):
            parts.append(f"<h3>Comparisons</h3><p>{html.escape(NOTE)}</p>{compared.html()}")
        parts.append(f'<div class="figures">{drawn(name, figures.of_sweep(groups), files)}</div>')
    if maps := drawn(name, figures.heat_maps(groups), files):
        parts.append(
            "<details><summary>Feature reuse: what each layer reads</summary><p>Mean |weight| of "
            "the first convolution that reads a source's feature maps, over its column's largest; "
            f'a box marks what stands behind the block.</p><div class="wide">{maps}</div></details>'
        )
    if seen := [assessed(name, run, files) for run in runs if run.assessment]:
        summary = "<summary>Classes, calibration and mistakes of each run</summary>"
        parts.append(f"<details>{summary}{''.join(seen)}</details>")
    if left:
        items = (f"<li>{html.escape(f'{run.name}: {run.state}')}</li>" for run in left)
        parts.append(
            f"<p>Not ended, damaged or not selected, in no mean:</p><ul>{''.join(items)}</ul>"
        )
    return "".join([*parts, provenance(runs), "</section>"])


def of(
    sweeps: dict[str, list[Run]], groups: dict[str, list[Group]], title: str, files: Files
) -> str:
    """The whole page; writes its figures.

    Args:
      sweeps: runs by sweep.
      groups: the runs that have ended, in groups that differ only in their seed.
      title: of the page.
      files: where the figures are written.
    """
    links = "".join(
        f'<a href="#{urllib.parse.quote(name)}">{html.escape(name.replace("_", " "))}</a>'
        for name in sweeps
    )
    parts = [f"<nav>{links}</nav>"]
    if networks := drawn("all", figures.of_all(groups), files):
        named = {f"{name}, {one.label()}": one for name in groups for one in groups[name]}
        parts.append(f"<section><h2>All networks</h2>{one_version(named)}")
        parts.append(f'<div class="figures">{networks}</div></section>')
    parts += [section(name, runs, groups[name], files) for name, runs in sweeps.items()]
    template = string.Template(TEMPLATE.read_text())
    return template.substitute(title=html.escape(title), body="".join(parts))
