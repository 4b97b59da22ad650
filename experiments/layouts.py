"""The same training on every layout of processes and devices, and what a killed process costs.

Command: python experiments/layouts.py --output=experiments/results/layouts
Needs:   CPUs alone; processes on this machine talk over TCP. About 15 minutes on 2 cores.

Every row is real processes of `python -m densejax.main` on the digits card with a small network,
whose loss is logged after each of its 66 steps, of which the first 50 are compared. Writes
layouts.csv, kill.json and rounding.json (what one device does whose initial parameters are changed
by one unit in the last place), and prints them. Runs are kept under --runs: a second start
goes on from what is there.
"""

import csv
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import script

from densejax.config import UserError

LAYOUTS = ((1, 1), (1, 4), (2, 2), (4, 1))  # processes, devices of each
FLAGS = (
    "--config=configs/digits.py:depth=10,growth_rate=4",
    *("--config.train.epochs=3", "--config.evaluate.every_epochs=0", "--config.log.every_steps=1"),
)
STEPS = 50


def start(
    run: pathlib.Path,
    processes: int,
    devices: int,
    dtype: str,
    mode: str,
    *flags: str,
    platform: str = "cpu",
) -> list[subprocess.Popen]:
    """Starts the processes of a run; what each prints goes to output<process> in its directory."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": platform,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_ENABLE_X64": str(int(dtype == "float64")),
    }
    run.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "densejax.main", *FLAGS, *flags, f"--workdir={run}"]
    command += [f"--config.train.dtype={dtype}", f"--config.parallel.mode={mode}"]
    started = []
    for process in range(processes):
        job = [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
        job = [*job, f"--process_id={process}"] if processes > 1 else ["--num_processes=1"]
        with open(run / f"output{process}", "w") as output:
            started.append(
                subprocess.Popen(
                    [*command, *job],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=pathlib.Path(__file__).parents[1],
                )
            )
    return started


def finish(run: pathlib.Path, started: list[subprocess.Popen]) -> None:
    """Waits for the processes of a run; raises UserError with its last line where one fails."""
    for number, code in enumerate(wait(run, started, seconds=600)):
        if code:
            output = run / f"output{number}"
            said = output.read_text().splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"{output}: the process ended with {code}: {said[0]}")


def wait(run: pathlib.Path, started: list[subprocess.Popen], seconds: float) -> list[int]:
    """Exit codes of processes of a run; kills them and raises UserError where one takes longer."""
    try:
        return [process.wait(seconds) for process in started]
    except subprocess.TimeoutExpired as error:
        for process in started:
            process.kill()
        raise UserError(
            f"{run}: a process went on after {seconds} seconds; output0 and the others beside it "
            f"say what it did"
        ) from error


def losses(run: pathlib.Path) -> list[float]:
    """The training loss of every step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["train_loss"] for record in records if "train_loss" in record][:STEPS]


def state(run: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every leaf of the last checkpoint, and of metrics.jsonl."""
    last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    record = json.loads((last / "MANIFEST").read_text())
    return record["leaves"] | {"metrics.jsonl": (run / "metrics.jsonl").read_text()}


def difference(first: list[float], second: list[float]) -> float:
    """The largest difference of two series of losses."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def compare(runs: pathlib.Path) -> list[dict]:
    """Every layout against one device, with shard_map and pmap, in float64 and float32."""

    def trained(name, *layout):
        run = runs / name
        for tries_left in (2, 1, 0):  # a machine that is suspended for seconds ends a job
            try:
                finish(run, start(run, *layout))  # a finished run prints its result again
                return run
            except UserError:
                if not tries_left:
                    raise

    rows = []
    for processes, devices in LAYOUTS:
        for mode in ("shard_map", "pmap"):
            row = {"processes": processes, "devices each": devices, "mode": mode}
            for dtype in ("float64", "float32"):
                layout = processes, devices, dtype, mode
                name = f"{processes}x{devices}-{mode}-{dtype}"
                run, again = trained(name, *layout), trained(f"{name}-again", *layout)
                found, one = losses(run), losses(runs / f"1x1-shard_map-{dtype}")
                if dtype == "float32":
                    row["float32, 10 steps"] = difference(found[:10], one[:10])
                row[f"{dtype}, {STEPS} steps"] = difference(found, one)
                row[f"{dtype} repeats bitwise"] = state(run) == state(again)
                twin = runs / f"{processes}x{devices}-shard_map-{dtype}"
                compared = STEPS if dtype == "float64" else 10
                row[f"{dtype}, {compared} steps, to shard_map"] = difference(
                    found[:compared], losses(twin)[:compared]
                )
            rows.append(row)
            print(row, flush=True)
    return rows


def kill(runs: pathlib.Path, victim: int) -> dict:
    """Kills one of two processes after 20 steps, starts both again, compares with no kill."""
    layout = 2, 1, "float32", "shard_map"
    run, whole = runs / f"killed-{victim}-{time.time():.0f}", runs / "2x1-shard_map-float32"
    flags = ("--config.checkpoint.every_epochs=1",)
    finish(whole, start(whole, *layout, *flags))
    started = start(run, *layout, *flags)
    while not (run / "checkpoints/22").exists():
        if started[0].poll() is not None:
            raise UserError(f"{run} ended early; {run}/output0 says why")
        time.sleep(0.01)
    started[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    (code,) = wait(run, [started[1 - victim]], seconds=60)
    seconds = time.monotonic() - begin
    last_line = (run / f"output{1 - victim}").read_text().splitlines()[-1]
    finish(run, start(run, *layout, *flags))
    return {
        "killed process": victim,
        "seconds until the other ended": round(seconds, 2),
        "its exit code": code,
        "its last line": last_line,
        "after a restart bitwise as without the kill": state(run) == state(whole),
    }


def rounding(draws: int = 8) -> list[dict]:
    """How far one device's losses move if its parameters start one unit in the last place apart."""
    import jax
    import numpy as np

    from configs import digits
    from densejax.training import experiment
    from densejax.training.step import train_step

    jax.config.update("jax_platforms", "cpu")  # as every other row
    config = digits.get_config("depth=10,growth_rate=4")
    config.train.epochs, config.evaluate.every_epochs = 3, 0
    built = experiment.build(config)
    step = built.map(train_step, donate=False)

    def series(draw):
        state, found, random = built.start(), [], np.random.default_rng(draw)
        if draw:
            params = jax.tree.map(
                lambda x: np.nextafter(x, random.choice(np.float32([-9, 9]), x.shape)),
                jax.device_get(state.params),
            )
            state = state.replace(params=jax.device_put(params, jax.tree.leaves(state)[0].sharding))
        for number in range(STEPS):
            state, sums = step(state, built.data.train.batch(number))
            found.append(float(sums["loss"]) / config.train.batch_size)
        return found

    one, rows = series(0), []
    for draw in range(1, draws + 1):
        other = series(draw)
        far = [n for n, (a, b) in enumerate(zip(one, other, strict=True), 1) if abs(a - b) > 1e-5]
        row = {"draw": draw, "first step that differs by 1e-5": far[0] if far else None}
        rows.append(row | {f"difference in {STEPS} steps": difference(one, other)})
    return rows


def main() -> None:
    """Runs what is not there yet, writes and prints the tables."""
    parser = script.Parser(__doc__)
    parser.add_argument(
        "--runs", type=script.path, default="runs/layouts", help="folder of the runs"
    )
    parser.add_argument("--output", type=script.path, required=True, help="folder of the results")
    options = parser.parse_args()
    runs = pathlib.Path(options.runs).absolute()  # the runs' processes have a folder of their own
    rows = compare(runs)
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "layouts.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = (f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values())
        print("| " + " | ".join(cells) + " |")
    killed = [kill(runs, victim) for victim in (0, 1)]
    (options.output / "kill.json").write_text(json.dumps(killed, indent=2) + "\n")
    rounded = rounding()
    (options.output / "rounding.json").write_text(json.dumps(rounded, indent=2) + "\n")
    print(json.dumps(killed + rounded, indent=2))


if __name__ == "__main__":
    script.run(main)
