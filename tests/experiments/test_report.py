"""A report of runs written by hand: its numbers, what has not ended, and the page in a browser."""

import csv
import html
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import densejax
from densejax import config as schema
from densejax import models

EXPERIMENTS = pathlib.Path(densejax.__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))  # where Python looks when one of them is run

import report  # noqa: E402

# (kind, growth rate or None, test accuracy by seed, accuracy on training images by seed)
DENSE = ("densenet_bc_40_12", 12, (0.90, 0.92, 0.91), (0.95, 0.96, 0.97))
THIN = ("densenet_bc_40_12", 4, (0.80, 0.82), (0.81, 0.81))
RESIDUAL = ("resnet20_cifar", None, (0.88, 0.89, 0.93), (0.99, 0.99, 0.99))


def write_run(root, sweep, axes, seed, model, accuracy=None, training=None, **facts):
    """A run directory as experiments/run.py leaves it, ended if it has an accuracy."""
    name = "_".join(map(str, axes.values())) + f"_seed{seed}"
    path = root / sweep / name
    path.mkdir(parents=True)
    config = schema.default()
    config.name, config.seed, config.data.name = "card", seed, "digits"
    config.model = models.fields(model)
    config.train.epochs, config.train.batch_size = 2, 64
    config = json.loads(config.to_json())
    if model == RESIDUAL[0]:
        del config["train"]["max_skipped_steps"]  # as if the key was newer than the run
    (path / "config.json").write_text(json.dumps(config))
    start = {"versions": {"jax": "1.2.3"}, "devices": "2 x cpu"}
    (path / "history.jsonl").write_text(json.dumps(start) + "\n")
    lines = [json.dumps({"step": 5, "epoch": 0.5, "train_accuracy": 0.25, "train_loss": 2.0})]
    if accuracy is not None:
        lines.append(json.dumps({"step": 10, "epoch": 1.0, "train_accuracy": 0.5}))
        result = {"test_accuracy": accuracy, "test_error": 1 - accuracy, "test_loss": 0.25}
        result |= {"train_accuracy": training, "train_error": 1 - training, "train_loss": 0.125}
        result |= {"steps": 20, "parameters": 1234, "multiply_adds": 5000} | facts
        result |= {"images_per_second": 100.0 + seed, "config": config}
        (path / "summary.json").write_text(json.dumps(result))
    text = "\n".join(lines) + "\n"
    (path / "metrics.jsonl").write_text(text if accuracy is not None else text + '{"step": 6, "ep')
    facts = {"sweep": sweep, "run": name, "seed": seed, "axes": axes | {"seed": seed}}
    command = f"python -m densejax.main --config=card.py --config.seed={seed} '<&>'"
    (path / "sweep.json").write_text(json.dumps(facts | {"command": command}))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report of two sweeps; of `connectivity` one run has not ended."""
    root = tmp_path_factory.mktemp("runs")
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
    before, sys.argv = sys.argv, ["report.py", f"--root={root}", f"--output={root}/page"]
    try:
        assert report.main() == 0
    finally:
        sys.argv = before
    return root / "page"


def rows_of(page, sweep):
    """The texts of a sweep's table, head first."""
    section = page[page.index(f'<section id="{sweep}"') :]
    table = section[section.index("<table>") : section.index("</table>")]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
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
    (row,) = (row for row in rows if row["finished"] == "False")
    assert (row["run"], row["test_accuracy"]) == ("one_shot_seed0", "")


def test_means_and_deviations(written):
    head, dense, residual = rows_of((written / "index.html").read_text(), "connectivity")
    columns = {name: (dense[n], residual[n]) for n, name in enumerate(head)}
    assert columns["kind"] == ("dense", "residual")
    assert columns["n"] == ("3", "3")
    # 90, 92, 91 and 88, 89, 93: deviations 1 and sqrt((4 + 1 + 9) / 2).
    assert columns["accuracy (%)"] == ("91.00 ± 1.00", "90.00 ± 2.65")
    assert columns["training (%)"] == ("96.00 ± 1.00", "99.00 ± 0.00")
    # 5, 4, 6 and 11, 10, 6.
    assert columns["gap (points)"] == ("5.00 ± 1.00", "9.00 ± 2.65")
    assert columns["parameters"] == ("1,234", "1,234")
    assert columns["training FLOP"] == ("38.4M", "46.08M")
    assert columns["images/s"] == ("101", "101")


def test_networks_of_one_recipe_are_in_one_figure(written):
    assert (written / "all_parameters.png").exists()


def test_numbers_are_in_their_order(written):
    rows = rows_of((written / "index.html").read_text(), "growth_rate")
    assert [row[0] for row in rows[1:]] == ["4", "12", "120"]
    assert rows[1][3] == "81.00 ± 1.41"
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
    assert "2 x cpu; jax 1.2.3" in page
    assert "This run: <code>seed=2</code>" in page  # what runs of one network differ in
    assert "How layers are joined" in page  # the sweep's question
    # Two figures of all networks, four of connectivity, five of growth_rate with its axis.
    assert "(ms)" not in "".join(rows_of(page, "connectivity")[0])
    assert page.count("<figure>") == len(list(written.glob("*.png"))) == 11


def test_a_root_without_runs_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", f"--root={tmp_path}"])
    assert report.main() == 2
    assert capsys.readouterr().err.startswith(f"densejax: --root={tmp_path}: it has no SWEEP/RUN")
    assert not list(tmp_path.iterdir())


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
    assert len(found["sizes"]) == 11
    assert all(
        left >= 0 and right <= 390 and height > 100 for left, right, height in found["sizes"]
    )
    turns = {(name, direction): texts for name, direction, texts in found["sorted"]}
    assert turns["accuracy (%)", "ascending"] == ["90.00 ± 2.65", "91.00 ± 1.00"]
    assert turns["accuracy (%)", "descending"] == ["91.00 ± 1.00", "90.00 ± 2.65"]
    assert turns["kind", "descending"] == ["residual", "dense"]
    assert turns["multiply-adds", "ascending"] == ["5k", "6k"]
