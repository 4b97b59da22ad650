"""A report of runs written by hand: its numbers, what has not ended, and the page in a browser."""

import csv
import hashlib
import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import types

import figures
import numpy as np
import pytest
import report
import script
from matplotlib.text import Text

from densejax import config as schema
from densejax import models
from densejax.analysis import assessment

# (kind, growth rate or None, test accuracy by seed, accuracy on training images by seed)
DENSE = ("densenet_bc_40_12", 12, (0.90, 0.92, 0.91), (0.95, 0.96, 0.97))
THIN = ("densenet_bc_40_12", 4, (0.80, 0.82), (0.81, 0.81))
RESIDUAL = ("resnet20_cifar", None, (0.88, 0.89, 0.93), (0.99, 0.99, 0.99))


def sealed(record):
    """The seal of a record: SHA-256 of its JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_run(root, sweep, axes, seed, model, accuracy=None, training=None, changes=None, **facts):
    """A run directory as experiments/run.py leaves it, ended if it has an accuracy."""
    name = "_".join(map(str, axes.values())) + f"_seed{seed}"
    path = root / sweep / name
    path.mkdir(parents=True)
    config = schema.default()
    config.name, config.seed, config.data.name = "card", seed, "digits"
    config.model = models.fields(model, **(changes or {}))
    config.train.epochs, config.train.batch_size = 2, 64
    config = json.loads(config.to_json())
    if model == RESIDUAL[0]:
        del config["train"]["average_decay"]  # as if the key was newer than the run
    (path / "config.json").write_text(json.dumps(config))
    versions = {"jax": "1.2.3", "code": "0123", "data": "d", "matmul_precision": "default on cpu"}
    start = {"versions": versions, "devices": "2 x cpu", "changes": []}
    start["sha256"] = sealed(start)
    (path / "history.jsonl").write_text(json.dumps(start) + "\n")
    lines = [json.dumps({"step": 5, "epoch": 0.5, "train_accuracy": 0.25, "train_loss": 2.0})]
    if accuracy is not None:
        lines.append(json.dumps({"step": 10, "epoch": 1.0, "train_accuracy": 0.5}))
        result = {"test_accuracy": accuracy, "test_error": 1 - accuracy, "test_loss": 0.25}
        result |= {"train_accuracy": training, "train_error": 1 - training, "train_loss": 0.125}
        result |= {"steps": 20, "parameters": 1234, "multiply_adds": 5000} | facts
        result |= {"images_per_second": 100.0 + seed, "config": config, "test_examples": 10}
        result |= {"versions": versions, "changes": []}
        result["sha256"] = sealed(result)
        (path / "summary.json").write_text(json.dumps(result))
    text = "\n".join(lines) + "\n"
    (path / "metrics.jsonl").write_text(text if accuracy is not None else text + '{"step": 6, "ep')
    facts = {"sweep": sweep, "run": name, "seed": seed, "axes": axes | {"seed": seed}}
    command = f"python -m densejax.main --config=card.py --config.seed={seed} '<&>'"
    (path / "sweep.json").write_text(json.dumps(facts | {"command": command}))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report of two sweeps; of `connectivity` one run has not ended."""
    root = tmp_path_factory.mktemp("runs") / "of [today]"  # brackets are no pattern
    for kind, (model, _, test, train) in (("dense", DENSE), ("residual", RESIDUAL)):
        for seed, values in enumerate(zip(test, train, strict=True)):
            multiply_adds = 5000 if kind == "dense" else 6000
            write_run(
                root,
                "connectivity",
                {"kind": kind},
                seed,
                model,
                *values,
                multiply_adds=multiply_adds,
            )
    write_run(root, "connectivity", {"kind": "one_shot"}, 0, "densenet_one_shot_40_20")
    for rate, (model, _, test, train) in ((4, THIN), (12, DENSE), (120, DENSE)):
        for seed, values in enumerate(zip(test, train, strict=True)):
            write_run(
                root,
                "growth_rate",
                {"growth_rate": rate},
                seed,
                model,
                *values,
                parameters=100 * rate,
            )
    seconds = {"4": {"1": 0.001, "64": 0.0123}, "12": {"1": 0.002, "64": 0.02}}
    latency = root / "growth_rate" / "latency.json"
    latency.write_text(json.dumps({"device": "cpu", "seconds": seconds}))
    assert call(root, f"--output={root}/page") == 0
    return root / "page"


def call(root, *flags):
    """The exit code of the command."""
    before, sys.argv = sys.argv, ["report.py", f"--root={root}", *flags]
    try:
        with pytest.raises(SystemExit) as ended:
            script.run(report.main)
    finally:
        sys.argv = before
    return ended.value.code or 0


@pytest.fixture
def without_figures(monkeypatch):
    """Drawing takes most of a report's time; other tests look at what is drawn."""
    monkeypatch.setattr(report.page, "drawn", lambda name, drawings, files: "")


def rows_of(page, sweep):
    """The texts of a sweep's table, head first."""
    section = page[page.index(f'<section id="{sweep}"') :]
    table = section[section.index("<table>") : section.index("</table>")]
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.split("<tr[^>]*>", table)[1:]
    ]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in rows]


def test_one_row_for_each_run(written):
    with (written / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 + 8
    assert list(rows[0])[:6] == ["sweep", "run", "seed", "finished", "parameters", "multiply_adds"]
    (row,) = (row for row in rows if (row["run"], row["sweep"]) == ("dense_seed1", "connectivity"))
    assert float(row["test_accuracy"]) == 0.92
    assert float(row["train_loss"]) == 0.125
    assert int(row["training_compute"]) == 6 * 5000 * 20 * 64
    assert float(row["gap"]) == pytest.approx(0.04)
    assert (row["kind"], row["growth_rate"]) == ("dense", "")
    known = [row[key] for key in ("split", "code", "data", "matmul_precision")]
    assert known == ["test", "0123", "d", "default on cpu"]
    (row,) = (row for row in rows if row["finished"] == "False")
    assert (row["run"], row["test_accuracy"]) == ("one_shot_seed0", "")


def test_means_and_deviations(written):
    head, dense, residual = rows_of((written / "index.html").read_text(), "connectivity")
    columns = {name: (dense[n], residual[n]) for n, name in enumerate(head)}
    assert columns["kind"] == ("dense", "residual")
    assert columns["n"] == ("3", "3")
    # 90, 92, 91 and 88, 89, 93: deviations 1 and sqrt((4 + 1 + 9) / 2), of which the interval has
    # Student's 4.303 of two degrees of freedom, over sqrt(3).
    assert columns["test accuracy (%) ± 95 % interval"] == ("91.00 ± 2.48", "90.00 ± 6.57")
    assert columns["training accuracy (%) ± 95 % interval"] == ("96.00 ± 2.48", "99.00 ± 0.00")
    # 5, 4, 6 and 11, 10, 6.
    assert columns["gap (points) ± 95 % interval"] == ("5.00 ± 2.48", "9.00 ± 6.57")
    assert columns["parameters"] == ("1,234", "1,234")
    assert columns["training FLOP"] == ("38.4M", "46.08M")
    assert columns["images/s"] == ("101", "101")


def test_numbers_are_in_their_order(written):
    rows = rows_of((written / "index.html").read_text(), "growth_rate")
    assert [row[0] for row in rows[1:]] == ["4", "12", "120"]
    assert rows[1][3] == "81.00 ± 12.71"  # 12.706 of one degree of freedom
    assert rows[0][-2:] == ["1 (ms)", "64 (ms)"]
    assert [row[-2:] for row in rows[1:]] == [["1", "12.3"], ["2", "20"], ["–", "–"]]


def test_what_has_not_ended_is_listed(written):
    page = (written / "index.html").read_text()
    assert "6 of 7 runs have ended" in page
    assert "<li>one_shot_seed0: epoch 0.5 of 2</li>" in page
    assert page.count("<li>") == 1


def test_the_page_stands_alone_and_says_where_numbers_come_from(written):
    page = (written / "index.html").read_text()
    loads = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"|url\((?!#)([^)]*)\)|@import', page)
    assert loads == []
    assert "--config.seed=2 &#x27;&lt;&amp;&gt;&#x27;" in page
    assert "2 x cpu; jax 1.2.3 code 0123" in page
    assert "Not all of these" not in page
    assert "This run: <code>seed=2</code>" in page  # what runs of one network differ in
    assert "How layers are joined" in page  # the sweep's question
    # Of all networks and of connectivity two or one counts and three of paths, each gap and curves,
    # and four of growth_rate with its axis.
    assert "(ms)" not in "".join(rows_of(page, "connectivity")[0])
    assert page.count("<figure>") == len(list(written.glob("*.png"))) == 15


def test_a_root_without_runs_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for root, message in (
        (tmp_path, f"--root={tmp_path}: it has no SWEEP/RUN"),
        (tmp_path / "missing", f"--root={tmp_path}/missing: it has no SWEEP/RUN"),
        (tmp_path / "file", f"--root={tmp_path}/file: it has no SWEEP/RUN"),
        ("", "argument --root: name a file or a folder"),
    ):
        assert call(root) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"densejax: {message}") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def pair(tmp_path):
    """A root with one point of a sweep, of two seeds: (root, directory of the second)."""
    for seed in (0, 1):
        write_run(tmp_path, "variants", {"variant": "bc"}, seed, DENSE[0], 0.9, 0.95)
    return tmp_path, tmp_path / "variants" / "bc_seed1"


def change(file, **facts):
    """Another result, sealed."""
    record = {k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"} | facts
    file.write_text(json.dumps(record | {"sha256": sealed(record)}))


@pytest.mark.usefixtures("without_figures")
def test_runs_that_were_too_short_to_be_timed_enter_the_mean(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path, "variants", {"kind": "bc"}, seed, DENSE[0], 0.9, 0.9)
        summary = tmp_path / "variants" / f"bc_seed{seed}" / "summary.json"
        change(summary, images_per_second=None)
    assert call(tmp_path) == 0
    assert capsys.readouterr().err == ""
    head, row = rows_of((tmp_path / "report" / "index.html").read_text(), "variants")
    assert (row[head.index("n")], row[head.index("images/s")]) == ("2", "–")


@pytest.mark.parametrize(
    "key, value, difference",
    [
        ("code", "4567", "bc_seed0 (code 0123) against bc_seed1 (code 4567)"),
        ("data", "e", "bc_seed0 (data d) against bc_seed1 (data e)"),
        ("weights", "f", "bc_seed0 (weights not recorded) against bc_seed1 (weights f)"),
        ("matmul_precision", "high on gpu", "bc_seed1 (matmul_precision high on gpu)"),
        ("jax", "2", "bc_seed0 (jax 1.2.3) against bc_seed1 (jax 2)"),
    ],
)
def test_no_mean_is_taken_over_different_versions(pair, capsys, key, value, difference):
    root, second = pair
    versions = json.loads((second / "summary.json").read_text())["versions"]
    change(second / "summary.json", versions=versions | {key: value})
    assert call(root) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "variants, variant bc: bc_seed0" in said
    assert difference in said
    assert not (root / "report").exists()


def test_no_mean_is_taken_over_different_trainings(pair, capsys):
    root, second = pair
    summary = json.loads((second / "summary.json").read_text())
    change(second / "summary.json", changes=["log.every_steps: 1 -> 2"])  # changes no number
    assert call(root) == 0
    change(second / "summary.json", changes=["versions.code: a -> 0123"])  # measured again
    assert call(root) == 2
    config = summary["config"] | {"optimizer": summary["config"]["optimizer"] | {"momentum": 0.5}}
    change(second / "summary.json", changes=[], config=config)
    (second / "config.json").write_text(json.dumps(config))
    assert call(root) == 2
    again, trained = capsys.readouterr().err.splitlines()
    assert "bc_seed1 (changes versions.code: a -> 0123)" in again
    assert "(config.optimizer.momentum 0.9) against bc_seed1 (config.optimizer.momentum" in trained


def test_code_that_nobody_recorded_is_not_taken_for_the_same(pair, capsys):
    root, second = pair
    for run in (second, second.with_name("bc_seed0")):  # of a time without seals
        record = json.loads((run / "summary.json").read_text()) | {"versions": {"jax": "1"}}
        del record["sha256"]
        (run / "summary.json").write_text(json.dumps(record))
    assert call(root) == 2
    assert "bc_seed0 (code not recorded by bc_seed0) against bc_seed1" in capsys.readouterr().err


def test_runs_of_one_version_are_selected(pair, capsys):
    root, second = pair
    versions = json.loads((second / "summary.json").read_text())["versions"]
    change(second / "summary.json", versions=versions | {"code": "4567"})
    assert call(root) == 2
    assert "--select=code=0123 takes those of one code" in capsys.readouterr().err
    assert call(root, "--select=code=4567", "--formats=svg,pdf") == 0
    with (root / "report" / "report.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["n"], row["code"], row["accuracy"]) == ("1", "4567", "0.9")
    assert row["accuracy_interval"] == row["accuracy_deviation"] == ""
    page = (root / "report" / "index.html").read_text()
    assert "<li>bc_seed0: code is 0123, not 4567</li>" in page
    assert (
        "data: digits, test images; epochs: 2; device: 2 x cpu; date: not recorded; code: 4567"
        in page
    )
    heads = {path.suffix: path.read_bytes()[:4] for path in (root / "report").iterdir()}
    assert (heads[".svg"], heads[".pdf"]) == (b"<?xm", b"%PDF") and ".png" not in heads
    assert call(root, "--formats=png,bmp") == 2


def test_no_seed_counts_twice(tmp_path, capsys):
    write_run(tmp_path, "grid", {"depth": 22}, 0, DENSE[0], 0.9, 0.95)
    shutil.copytree(tmp_path / "grid" / "22_seed0", tmp_path / "grid" / "depth=22_seed0")
    assert call(tmp_path) == 2
    said = "grid, depth 22: 22_seed0, depth=22_seed0 have a seed in common"
    assert said in capsys.readouterr().err and not (tmp_path / "report").exists()


@pytest.mark.usefixtures("without_figures")
def test_patterns_are_ranked_compared_and_named_alike(tmp_path):
    for kind, accuracy in {"chain": 0.75, "one_shot": 0.8, "dense": 0.9}.items():
        for seed in range(8):
            found = accuracy + 0.001 * (seed % 3)
            facts = {"changes": {"connect": kind}, "multiply_adds": 5000 + seed // 8}
            write_run(tmp_path, "patterns", {"kind": kind}, seed, DENSE[0], found, 0.95, **facts)
    facts = {"changes": {"connect": "hyper", "blocks": (2, 2, 2)}, "parameters": 9999}
    write_run(tmp_path, "patterns", {"kind": "hyper"}, 0, "preact_resnet164", 0.85, 0.9, **facts)
    assert call(tmp_path) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert [line.split(" ")[1] for line in text.splitlines()[10:14]] == [
        "**dense**",
        "hyper",
        "one-shot",
        "chain",
    ]
    # Of the four that were written down, one has its seeds: +10 points in every pair.
    values = "+10.00 ± 0.00 | 1.0000 | 0.0078 | 1.0000 | no difference"
    assert f"| dense − one-shot | 8 | {values}" in text
    assert "| dense − residual | 0 | – | – | – | – | open: n = 0 |" in text
    rows = rows_of((tmp_path / "report" / "index.html").read_text(), "patterns")
    # Three blocks of 6, each of whose outputs are read by all after them; a chain has one way.
    columns = {name: [row[n] for row in rows[1:]] for n, name in enumerate(rows[0])}
    assert columns["edges"][0] == str(3 * (21 + 7)) and columns["edges"][3] == str(3 * 7)
    assert columns["longest path"][0] == "18" and columns["mean path"][3] == "18.0"


def group(error, kind="dense", **axes):
    """A mean as figures read it, of one run; its costs grow with its growth rate."""
    rate = axes["growth_rate"]
    means = {"error": error, "parameters": 1000 * rate, "multiply_adds": 1e6 * rate}
    found = types.SimpleNamespace(axes=axes, kind=kind, split="test", runs=[0])
    found.label = lambda without: f"{kind} {axes | {without: 0}}"
    found.mean, found.half_width = lambda name: means.get(name, math.nan), lambda name: math.nan
    return found


def test_two_numbers_are_written_beside_their_marks():
    groups = [group(0.1, growth_rate=24), group(0.2, growth_rate=6)]
    drawn = list(figures.of_costs_and_paths(groups, ""))
    assert [name for name, _, _ in drawn] == ["parameters", "multiply_adds"]
    for name, caption, figure in drawn:
        assert "numbers: growth rate" in caption
        (axes,) = figure.axes
        assert {text.get_text() for text in axes.texts} == {"6", "24", "line: Pareto front"}
        scale = {"parameters": 1000, "multiply_adds": 1e6}[name]
        look = figures.style("dense")["color"], "-"  # not the front, whose colour is another
        (joined,) = [x for x in axes.lines if (x.get_color(), x.get_linestyle()) == look]
        assert joined.get_xydata().tolist() == [[6 * scale, 20], [24 * scale, 10]]


def test_one_line_where_one_number_follows_from_another():
    groups = [group(0.1, growth_rate=24, depth=18), group(0.2, growth_rate=6, depth=108)]
    figure = figures.along(groups, "growth_rate")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["6\n108", "24\n18"]
    assert axes.get_xlabel() == "growth rate\nbelow it: depth" and not figure.legends
    assert [6, 24] in [list(line.get_xdata()) for line in axes.lines]

    others = [*groups, group(0.3, "residual", growth_rate=12, depth=20)]  # no line of two kinds
    (axes,) = figures.along(others, "depth").axes
    assert all(len(line.get_xdata()) < 2 for line in axes.lines)
    assert list(axes.get_xticks()) == [18, 108]  # 20 would overlap 18


def test_kinds_look_different():
    looks = [tuple(figures.style(kind).items()) for kind in figures.LOOKS]
    assert len({look[:2] for look in looks}) == len(looks)


def test_labels_do_not_overlap():
    figure, (axes,) = figures.plots.figure(width=4.0)
    points = [(1 + 0.01 * n, 2 - 0.002 * n, f"label {n}", "red") for n in range(9)]
    points += [(0, 0, "o", "red"), (2, 4, "x", "red")]
    axes.plot([point[0] for point in points], [point[1] for point in points], "o")
    figures.annotate(axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_front_of_pareto():
    values = {"a": (1, 9), "b": (2, 8), "c": (2, 7), "d": (3, 7), "e": (4, 5), "f": (5, 6)}
    means = [
        types.SimpleNamespace(name=name, mean=dict(zip(("cost", "error"), pair, strict=True)).get)
        for name, pair in values.items()
    ]
    assert [group.name for group in figures.front(means, "cost")] == ["a", "c", "e"]


def test_what_did_not_learn_squeezes_no_picture():
    def group(name, error):
        return types.SimpleNamespace(label=lambda: name, mean={"error": error}.get)

    groups = [group("a", 0.09), group("b", 0.1), group("c", 0.39), group("plain", 0.9)]
    shown, said = figures.near(groups[:3])
    assert (shown, said) == (groups[:3], "")
    shown, said = figures.near([groups[0], *groups])
    assert shown == [groups[0], *groups[:3]]
    assert said == " Outside the picture: plain (90 %)."


@pytest.mark.usefixtures("without_figures")
def test_rows_of_other_versions_are_named(pair):
    root, second = pair
    write_run(root, "variants", {"variant": "b"}, 0, DENSE[0], 0.9, 0.95)
    third = root / "variants" / "b_seed0" / "summary.json"
    versions = json.loads(third.read_text())["versions"]
    change(third, versions=versions | {"code": "4567", "data": "other"})
    assert call(root) == 0
    page = (root / "report" / "index.html").read_text()
    said = (
        "Not all of these are of one version: variant b (code 4567) against variant bc (code 0123)."
    )
    assert said in page


def test_what_held_out_images_measured_is_not_called_test(pair):
    root, second = pair
    for run in (second, second.with_name("bc_seed0")):
        summary = json.loads((run / "summary.json").read_text())
        config = summary["config"]
        config["evaluate"] |= {"split": "validation", "final_split": "validation"}
        (run / "config.json").write_text(json.dumps(config))
        renamed = {key.replace("test_", "validation_"): value for key, value in summary.items()}
        (run / "summary.json").write_text(json.dumps(renamed))
        change(run / "summary.json", config=config)
    write_run(root, "variants", {"variant": "b"}, 0, DENSE[0], 0.8, 0.95)
    assert call(root) == 0
    head, b, bc = rows_of((root / "report" / "index.html").read_text(), "variants")
    column, other = (
        head.index(f"{split} accuracy (%) ± 95 % interval") for split in ("validation", "test")
    )
    assert (b[column], bc[column], b[other], bc[other]) == ("–", "90.00 ± 0.00", "80.00", "–")


def test_what_an_assessment_found_is_on_the_page(pair, capsys):
    root, second = pair
    labels, logits = np.array([0, 0, 0, 1]), np.eye(2, dtype=np.float32)[[0, 1, 1, 1]]
    found = assessment.assess(logits, labels, ("<cat_a>", "dog")) | {"split": "test"}
    summary = json.loads((second / "summary.json").read_text())
    found["result"] = summary["sha256"]
    (second / "assessment").mkdir()
    (second / "assessment" / "mistakes.png").write_bytes(b"picture")
    file = second / "assessment" / "assessment.json"
    file.write_text(json.dumps(found | {"sha256": sealed(found)}))
    assert call(root) == 0
    page = (root / "report" / "index.html").read_text()
    # Of three cats one is found; of three taken for dogs one is. Probabilities are e / (1 + e).
    assert "bc_seed1: accuracy 50.00 %, calibration error 23.11 %" in page
    details = page[page.index("bc_seed1: accuracy 50.00") :]
    details = details[: details.index("</details>")]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in details.split("<tr>")[2:]]
    cat = ["&lt;cat_a&gt;", "100.00", "33.33", "50.00"]
    assert cells == [cat, ["dog", "33.33", "100.00", "50.00"]]
    assert details.count("<svg") == 2 and "<cat" not in page
    assert '<img src="data:image/png;base64,cGljdHVyZQ=="' in details
    for name in ("confusion", "reliability"):
        assert (root / "report" / f"variants_{name}_bc_seed1.png").exists()
    change(second / "summary.json", images_per_second=1.0)  # another result has none
    assert call(root) == 0
    assert "calibration" not in (root / "report" / "index.html").read_text()
    change(second / "summary.json", **{k: v for k, v in summary.items() if k != "sha256"})
    file.write_text("[]")
    assert call(root) == 0
    assert "assessment.json is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    "file, text, why",
    [
        ("summary.json", '{"config": {"na', "summary.json is damaged"),
        ("summary.json", "[1]", "summary.json is damaged"),
        ("config.json", "{", "config.json is damaged (Expecting"),
        ("metrics.jsonl", '{"ep\n{"epoch": 1}\n', "metrics.jsonl is damaged (Invalid control"),
        ("history.jsonl", "{}\n", "history.jsonl is damaged"),
        ("sweep.json", "", "sweep.json is damaged (Expecting"),
        ("sweep.json", "[" * 100000, "sweep.json is damaged (it is nested too deeply"),
        ("sweep.json", '{"axes": {"a": [1]}, "seed": 1, "command": ""}', "axes = {'a': [1]}"),
    ],
)
def test_damage_costs_one_run_and_is_said(pair, capsys, file, text, why):
    root, second = pair
    (second / file).write_text(text)
    assert call(root) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"densejax: {second} is left out: damaged: ") and said.count("\n") == 1
    assert why in said
    page = (root / "report" / "index.html").read_text()
    assert "1 of 2 runs have ended" in page and "<li>bc_seed1: damaged: " in page
    assert rows_of(page, "variants")[1][:3] == ["bc", "dense", "1"]


@pytest.mark.usefixtures("without_figures")
def test_a_run_that_goes_on_to_more_epochs_has_not_ended(pair):
    root, second = pair
    config = json.loads((second / "config.json").read_text())
    config["train"]["epochs"] = 4
    (second / "config.json").write_text(json.dumps(config))
    assert call(root) == 0
    assert "<li>bc_seed1: epoch 1.0 of 4</li>" in (root / "report" / "index.html").read_text()


def test_names_stay_in_the_folder_and_are_text(tmp_path):
    """Names of sweeps, runs and axes come from files and folders that anyone may have written."""
    script_tag, formula = "<script>alert(1)", '=HYPERLINK("http://a.b")'
    for seed, value in enumerate((1, 2, 3)):
        write_run(tmp_path, f"a b{script_tag}", {"../../n": value}, 0, DENSE[0], 0.9, 0.95)
        sweep = tmp_path / f"a b{script_tag}" / f"{value}_seed0" / "sweep.json"
        facts = json.loads(sweep.read_text()) | {"sweep": "../../evil", "run": "../../evil"}
        axes = {"../../n": value, script_tag: "@SUM(1)$\\no$", "seed": seed}
        sweep.write_text(json.dumps(facts | {"axes": axes, "command": formula}))
    assert call(tmp_path, f"--output={tmp_path}/out") == 0
    assert not list(tmp_path.parent.glob("*evil*")) and not list(tmp_path.glob("*.png"))
    assert {path.parent for path in tmp_path.rglob("*.png")} == {tmp_path / "out"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script>alert" not in page
    assert 'href="#a%20b%3Cscript%3Ealert%281%29"' in page
    with (tmp_path / "out" / "runs.csv").open() as file:
        rows = list(csv.reader(file))
    cells = [cell for row in rows for cell in row]
    assert f"'{formula}" in cells and "'@SUM(1)$\\no$" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t"))]


PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message)), true);
addEventListener("load", () => {
  const table = document.querySelector("#connectivity table"), sorted = [];
  const texts = column => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  for (const button of table.querySelectorAll("button")) {
    const head = button.closest("th");
    for (const turn of [1, 2]) {
      button.click();
      sorted.push([head.textContent, head.getAttribute("aria-sort"), texts(head.cellIndex)]);
    }
  }
  const sizes = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    return [box.left, box.right, box.height];
  });
  const width = document.documentElement.scrollWidth;
  parent.postMessage(JSON.stringify({errors, sorted, sizes, width, inner: innerWidth}), "*");
});
</script>
"""
FRAME = """
<iframe src="probed.html" style="width:390px;height:844px;border:0"></iframe><pre></pre>
<script>
addEventListener("message", event => document.querySelector("pre").textContent = event.data);
</script>
"""


@pytest.mark.slow
def test_the_page_in_a_browser_on_a_phone(written, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    page = (written / "index.html").read_text()
    (tmp_path / "probed.html").write_text(page.replace("<head>", "<head>" + PROBE, 1))
    (tmp_path / "frame.html").write_text(FRAME)
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=800,900"]
    command += [f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/frame.html"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", run.stdout, re.DOTALL)[1]))
    assert "CONSOLE" not in run.stderr and found["errors"] == []
    assert found["inner"] == 390 and found["width"] <= 390
    assert len(found["sizes"]) == 15
    assert all(
        left >= 0 and right <= 390 and height > 100 for left, right, height in found["sizes"]
    )
    accuracy = "test accuracy (%) ± 95 % interval"
    turns = {(name, direction): texts for name, direction, texts in found["sorted"]}
    assert turns[accuracy, "ascending"] == ["90.00 ± 6.57", "91.00 ± 2.48"]
    assert turns[accuracy, "descending"] == ["91.00 ± 2.48", "90.00 ± 6.57"]
    assert turns["kind", "descending"] == ["residual", "dense"]
    assert turns["multiply-adds", "ascending"] == ["5k", "6k"]
