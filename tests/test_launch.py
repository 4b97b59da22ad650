"""The scripts in launch/ give the commands that they promise, with stand-ins for the clusters."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from tests import small

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" > "output$task" 2>&1 &
  tasks+=($!)
done
wait "${tasks[0]}" && wait "${tasks[1]}"
"""


@pytest.fixture
def tool(tmp_path):
    """Writes a program on a PATH of its own; returns the environment that finds it."""

    def write(name, text):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
        return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}

    return write


def test_a_tpu_slice_gets_one_command_for_every_host(tool):
    environment = tool("gcloud", '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    flags = ["--config=configs/digits.py:depth=10", "--config.optimizer.drop_at=(0.5, 0.75)"]
    command = [LAUNCH / "tpu_vm.sh", "slice", "zone", "gs://bucket/a run", *flags]
    output = subprocess.check_output(command, env=environment, text=True).splitlines()
    assert output[:-1] == "compute tpus tpu-vm ssh slice --zone=zone --worker=all".split()
    remote = shlex.split(output[-1].removeprefix("--command="))
    assert remote[:5] == ["cd", "densejax", "&&", ".venv/bin/python", "-m"]
    assert remote[5:] == ["densejax.main", "--workdir=gs://bucket/a run", *flags]
    short = subprocess.run([*command[:3]], capture_output=True, text=True)
    assert short.returncode == 2 and "NAME ZONE WORKDIR" in short.stderr


@pytest.mark.slow
def test_slurm_runs_one_process_for_each_task_and_asks_for_more_time(tool, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    tool("scontrol", '#!/usr/bin/env bash\necho "$@" > requeued\n')
    environment = tool("srun", SRUN) | small.ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "1"}
    environment |= {"PYTHONPATH": str(LAUNCH.parent), "SLURM_JOB_ID": str(os.getpid())}
    card = small.card(tmp_path, train__epochs=1)
    command = ["bash", LAUNCH / "slurm.sbatch", tmp_path / "run", f"--config={card}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    outputs = [(tmp_path / f"output{task}").read_text() for task in range(2)]
    assert "devices  2 x cpu" in outputs[0] and "devices" not in outputs[1]
    assert (tmp_path / "run/summary.json").exists() and not (tmp_path / "requeued").exists()
    tool("srun", "#!/usr/bin/env bash\n")  # stopped before the end
    command[2] = tmp_path / "other"
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
