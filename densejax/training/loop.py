"""The code of a run, from top to bottom: build, restore, step, log, evaluate, save, report.

What a resume does: (1) a run directory belongs to one configuration; (2) a start in it restores
the newest intact checkpoint; (3) the step number is the position in the data and in every random
stream, so the later steps are bitwise those of a run without the interruption; (4) records of
metrics.jsonl after that step are removed and written again; (5) an evaluation that a signal
interrupted comes first; (6) a finished run prints its result again, if all versions are still those
that it was measured with; otherwise it is refused, and --resume=force measures it again.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

import densejax
from densejax.config import UserError, flatten
from densejax.data import facts
from densejax.data.builders import DataError
from densejax.runs import checkpoint, files, goodput, hosts, lock, metric_log, workdir
from densejax.training import metrics, result
from densejax.training.experiment import (
    Diverged,
    Experiment,
    build,
    open_checkpoints,
    select,
)
from densejax.training.step import TrainState, head_step, train_step

Callback = Callable[[int, dict[str, float]], None]  # called with (step, what was logged by name)


def run(
    config: ConfigDict,
    directory: str,
    mode: str = "train",
    force: bool = False,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Trains, or resumes, or evaluates; returns the process's exit code.

    Args:
      config: the whole configuration.
      directory: the run directory; nothing is written there before all checks have passed.
      mode: "train" or "eval".
      force: resume in the directory of another configuration.
      callbacks: each is called on process 0 with whatever metrics.jsonl gets.
    """
    experiment = build(config)
    config = experiment.config
    path = files.path_of("--workdir", directory)
    versions, is_run, summary, changes = result.versions(config), False, None, []
    flags = {"--mode": mode, "--workdir": directory, "--resume": "force" if force else "same"}
    hosts.require_same(flatten(config) | versions | flags)
    if jax.process_index() == 0:  # it decides: another host may still see an older directory
        is_run = (path / "config.json").exists()
        if mode == "train":
            lock.require_free(path)
            summary = result.finished(path, config, versions, force)
            if is_run and not force and not summary:
                workdir.check(path, config, versions)
        elif is_run or not config.train.weights:
            changes = workdir.check(path, config, versions, measures=True)
    is_run, is_finished = hosts.gather([is_run, summary is not None])[0]
    if is_finished:
        if summary:
            result.say(result.line(summary, path))
        return 0
    _ = experiment.data  # data that cannot be read is reported before anything is written
    if is_run and (mode == "eval" or not force):
        facts.require_same(path, experiment.info)
    with contextlib.closing(open_checkpoints(config, path)) as checkpoints:
        if mode == "eval":
            outcome = result.measure(experiment, select(experiment, checkpoints))
            outcome["damaged_checkpoints"] = checkpoints.damaged_steps
            result.say(json.dumps(outcome | {"versions": versions, "changes": changes}, indent=2))
            return 0
        start = checkpoints.latest_step() or 0
        if start > experiment.steps:
            name = "max_steps" if experiment.steps == config.train.max_steps else "epochs"
            raise UserError(
                f"train.{name} = {config.train[name]}: {path} has {start} steps behind it, more "
                f"than these {experiment.steps}; give more or another --workdir"
            )
        if start == 0:
            _ = experiment.weights  # weights that do not fit are refused before anything is written
    versions |= {"data": experiment.data.version}
    with workdir.open_run(path, config, force, versions) as guard:
        if jax.process_index() == 0 and (force or not (path / facts.FILE).exists()):
            facts.write(path, experiment.info, experiment.data.sample())
        return train(experiment, path, versions, guard, callbacks)


def train(
    experiment: Experiment,
    path: epath.Path,
    versions: dict[str, str],
    guard: Callable[[], None],
    callbacks: Sequence[Callback] = (),
) -> int:
    """Trains on from the newest checkpoint, if there is one; returns the process's exit code.

    Args:
      experiment: what to train.
      path: of the run directory, whose lock is held.
      versions: what the result depends on; the result stores them.
      guard: called before every write; LockError if another process has taken the directory over.
      callbacks: as for `run`.
    """
    config = experiment.config
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(hosts.Stop())
        checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(config, path, guard)))
        stack.enter_context(contextlib.closing(experiment.data))
        experiment.data.stop_waiting_when(lambda: stop.received is not None)
        state = checkpoints.restore_latest(experiment.abstract_state)
        start = 0 if state is None else int(state.step)
        if start:
            state = since_last_record(state, config)
        history = workdir.history(path)
        clock = goodput.Goodput(
            path / "goodput.json", start, densejax.STARTED, config.log.seconds, len(history), guard
        )
        clock.write()
        stack.callback(clock.write)
        described = result.summarise(experiment, path, start)
        log = metric_log.MetricLog(
            path,
            total_steps=experiment.steps,
            start_step=start,
            batch_size=config.train.batch_size,
            epoch_steps=experiment.data.train.steps_per_epoch,
            seconds=config.log.seconds,
            evaluates_first=evaluates_first(experiment, checkpoints, start),
            saved=checkpoints.records(start),
            guard=guard,
        )
        stack.enter_context(contextlib.closing(log))
        state = experiment.start() if state is None else state
        loop = Loop(experiment, state, log, checkpoints, stop, clock, callbacks)
        loop.run(path / "profile")
        log.clear()
        if loop.patience.is_over:
            result.say(
                f"step {int(loop.state.step)}: the error on held-out images was not lower for "
                f"train.patience = {config.train.patience} evaluations; training ends"
            )
        with clock.measure("save"):
            checkpoints.wait()
        if not stop.signal:
            chosen, passed_over = loop.state, []
            if config.checkpoint.select == "best":
                chosen = select(experiment, checkpoints)
                passed_over = checkpoints.damaged_steps
            with log.pause(), clock.measure("evaluation"):
                known = loop.evaluated if chosen is loop.state else {}
                outcome = result.measure(experiment, chosen, known, stop.after_step)
        clock.checkpoint_saved(int(loop.state.step), checkpoints.steps())
        if stop.signal:
            result.say(
                f"{stop.signal.name}: saved step {int(loop.state.step)}; the same command goes on "
                f"from it"
            )
            return 128 + signal.SIGINT if stop.signal is signal.SIGINT else 0
    outcome |= described | {
        "damaged_checkpoints": passed_over,
        "seconds_to_first_step": loop.seconds_to_first_step,
        "images_per_second": log.images_per_second,
        "versions": versions,
        "changes": [change for start in history for change in start["changes"]],
        "config": json.loads(config.to_json()),
    }
    if jax.process_index() == 0:
        advice = "all is saved: the same command writes it once there is room"
        with files.writing(f"workdir={path}: the result cannot be written", advice):
            guard()
            files.write_json(path / "summary.json", files.seal(outcome))
    result.say(result.line(outcome, path))
    return 0


def since_last_record(state: TrainState, config: ConfigDict) -> TrainState:
    """The state, without sums of steps before the last record: `log.every_steps` may be another."""
    steps = (int(state.step) - 1) % config.log.every_steps + 1
    if int(state.metrics["count"]) <= steps * config.train.batch_size:
        return state
    return state.replace(metrics=jax.tree.map(lambda leaf: 0 * leaf, state.metrics))


class Loop:
    """Takes steps until the last, or until `stop` says that all processes stop.

    Attributes:
      state: after the last step that was taken.
      evaluated: the metrics of the last step's evaluation by split.
      seconds_to_first_step: from the package's import to the end of this start's first step; None
        without one.
    """

    def __init__(
        self,
        experiment: Experiment,
        state: TrainState,
        log: metric_log.MetricLog,
        checkpoints: checkpoint.Checkpoints,
        stop: hosts.Stop,
        clock: goodput.Goodput,
        callbacks: Sequence[Callback] = (),
    ):
        """Takes no step yet; `run` does."""
        self.experiment, self.state, self.log = experiment, state, log
        self.checkpoints, self.stop, self.clock = checkpoints, stop, clock
        self.callbacks = callbacks if jax.process_index() == 0 else ()
        self.evaluated: dict[str, dict[str, float]] = {}
        self.seconds_to_first_step: float | None = None
        stored = checkpoints.metrics(int(state.step))
        self.patience = Patience(experiment.config.train.patience, stored)
        self._under_way = None  # (step, its metrics), not looked at yet
        self._error = 0, math.nan  # (step of the last evaluation, its error)

    def run(self, traces: epath.Path) -> None:
        """Runs to the end; `traces` is where the profile of `profile.steps` goes."""
        start = int(self.state.step)
        if evaluates_first(self.experiment, self.checkpoints, start):
            with self.log.pause():
                self._evaluate(start)
            if self.stop.signal:
                return
            self.checkpoints.set_metrics(start, self._metrics_of(start))
        try:
            if not self.patience.is_over:
                self._take_steps(start, traces)
        except DataError as error:
            self._save_after_failed_input(error)
        self.clock.switch_to("step")

    def _take_steps(self, start: int, traces: epath.Path) -> None:
        config, last = self.experiment.config, self.experiment.steps
        data, clock = self.experiment.data.train, self.clock
        evaluate_every = config.evaluate.every_epochs * data.steps_per_epoch
        save_every = config.checkpoint.every_epochs * data.steps_per_epoch
        best_is_kept = config.checkpoint.select == "best"
        # A start that resumes within these steps traces from its own first step on.
        first_traced, last_traced = config.profile.steps or (0, 0)
        head_steps = config.train.head_epochs * data.steps_per_epoch
        take_head_step, take_step = (
            self.experiment.map(step, donate=True) for step in (head_step, train_step)
        )
        with contextlib.ExitStack() as profile:
            for step in range(start + 1, last + 1):
                if step == max(first_traced, start + 1) <= last_traced and not jax.process_index():
                    profile.enter_context(metric_log.trace(traces, self.log.guard))
                with clock.measure("input_wait"):
                    batch = data.batch(step - 1)
                compiles = step in (start + 1, head_steps + 1)
                clock.switch_to("compile" if compiles else "step")
                take = take_head_step if step <= head_steps else take_step
                self.state, sums = take(self.state, batch)
                if self.seconds_to_first_step is None:
                    jax.block_until_ready(sums)
                    self.seconds_to_first_step = time.monotonic() - densejax.STARTED
                    if step == 1 and jax.process_index() == 0:
                        self.log.describe(config, self.experiment.augmented(self.state.key, batch))
                clock.switch_to("step")
                # While the devices compute this step, the step before it is checked and logged.
                # Only one step is queued, so that a signal need not wait long.
                self._look_at_step_under_way()
                self._under_way = step, sums
                if step == last_traced:
                    jax.block_until_ready(sums)
                    profile.close()
                stops = self.stop.after_step()  # one after this line waits for the next step
                evaluates = due(step, evaluate_every, last) and not stops
                saves = stops or due(step, save_every, last) or (evaluates and best_is_kept)
                if evaluates or saves:
                    self._look_at_step_under_way()
                    with self.log.pause():
                        if evaluates:
                            self._evaluate(step)
                        stops = stops or self.stop.signal is not None or self.patience.is_over
                        if saves or stops:
                            self._save(step)
                clock.write(now=saves)
                if stops:
                    return

    def _look_at_step_under_way(self) -> None:
        """Waits for the step under way and logs it; Diverged after too many skipped steps."""
        if self._under_way is None:
            return
        (step, sums), self._under_way = self._under_way, None
        config = self.experiment.config
        skipped, in_a_row = map(int, jax.device_get(sums["skipped"]))
        if in_a_row:
            logging.warning("Step %d is skipped: it is not finite (%d in a row).", step, in_a_row)
        if in_a_row >= config.train.max_skipped_steps:
            raise Diverged(
                f"train.max_skipped_steps = {config.train.max_skipped_steps}: {in_a_row} steps in "
                f"a row, up to {step}, were not finite; the newest checkpoint is of step "
                f"{self.checkpoints.latest_step()}; look at the data or lower "
                f"optimizer.learning_rate"
            )
        if due(step, config.log.every_steps, self.experiment.steps):
            values = metrics.means(sums) if int(sums["count"]) else {}  # 0: all were skipped
            values = {f"train_{name}": value for name, value in values.items()}
            values |= {"skipped_steps": skipped, "learning_rate": float(sums["learning_rate"])}
            self.log.train(step, values)
            self._call_back(step, values)
        self.log.step(step)

    def _evaluate(self, step: int) -> None:
        """Evaluates and logs, unless a signal interrupts the evaluation."""
        split = self.experiment.config.evaluate.split
        with self.clock.measure("evaluation"):
            values = self.experiment.evaluate(self.state, split, self.stop.after_step)
        if values is None:
            return
        self.evaluated, self._error = {split: values}, (step, 1 - values["accuracy"])
        self.patience.see(1 - values["accuracy"])
        self.log.evaluation(step, split, values)
        self._call_back(step, {f"{split}_{name}": value for name, value in values.items()})

    def _metrics_of(self, step: int) -> dict[str, float]:
        """What a checkpoint of `step` stores: its error, NaN if it was not evaluated, and more."""
        evaluated, error = self._error
        error = error if evaluated == step else math.nan
        return {f"{self.experiment.config.evaluate.split}_error": error} | self.patience.metrics

    def _save(self, step: int) -> None:
        metrics = self._metrics_of(step)
        with self.clock.measure("save"):
            self.checkpoints.save(step, self.state, metrics, self.log.problem, self.log.digest)
        self.clock.checkpoint_saved(step, self.checkpoints.steps())

    def _save_after_failed_input(self, error: DataError) -> None:
        """Saves the state, which is still good; raises the error unless a signal stops the run."""
        step = int(self.state.step)
        if jax.process_count() > 1 or not step:  # a save needs all processes; others wait in a step
            raise error
        self._look_at_step_under_way()
        with self.log.pause():
            self._save(step)
        self.checkpoints.wait()
        if not self.stop.after_step():
            raise DataError(f"{error}; step {step} is saved") from error

    def _call_back(self, step: int, values: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback(step, values)


class Patience:
    """Decides when training ends early; its `metrics` are saved with each checkpoint."""

    def __init__(self, limit: int, metrics: Mapping[str, float]):
        """Goes on from the metrics of a checkpoint; `limit` is `train.patience`."""
        self._limit = limit
        self.metrics = {"lowest_error": math.inf, "evaluations_since": 0} if limit else {}
        self.metrics |= {name: metrics[name] for name in self.metrics if name in metrics}

    def see(self, error: float) -> None:
        """Records the error of an evaluation."""
        if self._limit and error < self.metrics["lowest_error"]:
            self.metrics = {"lowest_error": error, "evaluations_since": 0}
        elif self._limit:
            self.metrics["evaluations_since"] += 1

    @property
    def is_over(self) -> bool:
        """Whether the last `limit` evaluations have brought no lower error."""
        return self._limit > 0 and self.metrics["evaluations_since"] >= self._limit


def due(step: int, every: int, last: int) -> bool:
    """Whether an action is due after `step`: every `every` steps (0: never), and at the last."""
    return every > 0 and (step % every == 0 or step == last)


def evaluates_first(
    experiment: Experiment, checkpoints: checkpoint.Checkpoints, start: int
) -> bool:
    """Whether a signal interrupted the evaluation of the step that the run goes on from."""
    evaluate = experiment.config.evaluate
    every = evaluate.every_epochs * experiment.data.train.steps_per_epoch
    error = checkpoints.metrics(start).get(f"{evaluate.split}_error", math.nan)
    return start > 0 and due(start, every, experiment.steps) and math.isnan(error)
