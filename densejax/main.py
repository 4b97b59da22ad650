"""Trains, resumes or evaluates: python -m densejax.main --config=configs/cifar10.py."""

if __name__ == "__main__":
    from densejax.runs import large_pages

    large_pages.use()  # before the imports below, which take seconds

from absl import flags

from densejax import command_line
from densejax.runs import files, hosts, workdir
from densejax.training import experiment, loop, parallel

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory. latest: the newest run. Default: runs/<card>-<digest>."
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate a checkpoint.")
RESUME = flags.DEFINE_enum(
    "resume",
    "same",
    ["same", "force"],
    "force: continue although the configuration, code or data have changed.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0. TPU pods and SLURM are detected without it."
)
PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "The number of processes of the job. 1: this process runs alone, even inside SLURM.",
)
PROCESS = flags.DEFINE_integer("process_id", None, "The number of this process, counted from 0.")


def main() -> int:
    """Does what the flags say; returns the exit code."""
    config = command_line.CONFIG.value
    with hosts.joined(COORDINATOR.value, PROCESSES.value, PROCESS.value):
        config = experiment.build(config).config  # bad input is said before anything is written
        if assesses := config.evaluate.assess and MODE.value == "train":
            from densejax.analysis import assessment  # matplotlib may be missing
        parallel.start()
        directory = command_line.run_directory(WORKDIR) or workdir.default(config)
        code = loop.run(config, directory, MODE.value, force=RESUME.value == "force")
        if assesses and not code:
            assessment.at_the_end(files.path_of("--workdir", directory), config)
        return code


if __name__ == "__main__":
    command_line.run(main)
