"""Says which classes a network confuses, and more: python -m densejax.assess --workdir=DIR.

Writes `assessment/` into the run's directory: the confusion matrix, precision and recall of each
class, the calibration and the most confident mistakes, as pictures and as assessment.json.
"""

from absl import flags
from etils import epath

from densejax import command_line
from densejax.config import printable
from densejax.runs import formats
from densejax.training import parallel

WORKDIR = flags.DEFINE_string("workdir", None, "A run's directory; latest: the newest.")
SPLIT = flags.DEFINE_string(
    "split",
    None,
    "test, validation or train. Default: the images that the result was measured on.",
)


def main() -> int:
    """Does what the flags say; returns the exit code."""
    command_line.require(WORKDIR)
    from densejax.analysis import assessment  # matplotlib may be missing

    path = epath.Path(command_line.run_directory(WORKDIR))
    parallel.start()
    found = assessment.of_run(path, SPLIT.value or "")
    rows = list(zip(*found["classes"].values(), strict=True))
    lines = [("class, lowest recall first", "precision", "recall", "f1")]
    for name, *scores in sorted(rows, key=lambda row: (row[2] is None, row[2] or 0))[:10]:
        scores = ("-" if score is None else formats.percent(score) for score in scores)
        lines.append((printable(name), *scores))
    print(formats.table(lines, right=3))
    print(assessment.line(found, path))
    return 0


if __name__ == "__main__":
    command_line.run(main, config="unused")
