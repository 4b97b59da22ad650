"""Says which classes a network confuses, and more: python -m densejax.assess --workdir=DIR.

Writes `assessment/` into the run's directory: the confusion matrix, precision and recall of each
class, the calibration and the most confident mistakes, as pictures and as assessment.json.
"""

from absl import flags
from etils import epath

from densejax import command_line
from densejax.config import UserError, printable
from densejax.runs import formats
from densejax.training import parallel

# An override lets the tests import several commands into one process.
WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run's directory; latest: the newest.", allow_override=True
)
SPLIT = flags.DEFINE_string(
    "split", None, "test, validation or train; default: what the result is of."
)


def main() -> int:
    """Does what the flags say; returns the exit code."""
    command_line.require(WORKDIR)
    from densejax.analysis import assessment  # matplotlib may be missing

    path = epath.Path(command_line.run_directory(WORKDIR))
    parallel.start()
    if (path / "model.json").exists():
        raise UserError(f"--workdir={path}: weights have no images of their own; give a run")
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
