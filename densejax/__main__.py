"""The command `densejax`: its train is python -m densejax.main, and so on."""

import runpy
import sys

from densejax.config import did_you_mean

# name: (module, flags that stand before those given, what it does)
COMMANDS = {
    "train": ("main", [], "Train a network, or resume a run."),
    "eval": ("main", ["--mode=eval"], "Measure the checkpoint of a run."),
    "assess": ("assess", [], "Say which classes a network confuses."),
    "predict": ("predict", [], "Classify image files."),
    "summary": ("summary", [], "Show a network layer by layer."),
    "export": ("export", [], "Write a network, or its weights, for use elsewhere."),
    "pretrained": ("pretrained", [], "Make weights from another project's file."),
    "reuse": ("reuse", [], "Draw which earlier layers each layer reads."),
    "cut": ("cut", [], "Measure which connections a trained network needs."),
    "compile": ("compile", [], "Estimate the memory and time of a step on other devices."),
}


def main() -> int:
    """Runs the command that is asked for, as `python -m densejax.MODULE` does."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "-help", "--help"):
        lines = [f"  densejax {name:12}{does}" for name, (_, _, does) in COMMANDS.items()]
        print(__doc__, *lines, "densejax COMMAND --help explains one.", sep="\n")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        said = f"{name!r} is no command{did_you_mean(name, COMMANDS)}; commands are {known}"
        print(f"densejax: {said}", file=sys.stderr)
        return 2
    module, before, _ = COMMANDS[name]
    sys.argv[1:] = [*before, *words]
    runpy.run_module(f"densejax.{module}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
