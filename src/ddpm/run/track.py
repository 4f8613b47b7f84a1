"""Trackers that a run also sends its curves to: `TRACKERS` has a row for each, with the function beside it.

A tracker gets each line of metrics.jsonl. RUN/track.json holds its name of the run, so that a resumed run goes on
there.
"""

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ddpm.errors import InputError, brief, not_installed, parse_json
from ddpm.files import atomic

Send = Callable[[int, dict[str, float]], None]
"""send(step, values) gives a tracker the numbers of one line."""


class Tracker(NamedTuple):
    """A kind of tracker.

    open     (the run's folder, the step that the run goes on from, its settings) -> a context with `Send`
    package  what has to be installed; the extra of this distribution has the tracker's name
    meaning  what help says of it
    """

    open: Callable[[Path, int, Mapping[str, Any]], AbstractContextManager[Send]]
    package: str
    meaning: str


def check(name: str) -> None:
    """Raise InputError if the tracker's package is missing; `none` needs none."""
    if name != "none" and importlib.util.find_spec(TRACKERS[name].package) is None:
        raise not_installed(TRACKERS[name].package, name)


@contextmanager
def tracker(
    name: str, out: Path, step: int, settings: Mapping[str, Any]
) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A context with the function that sends a line of metrics.jsonl to the tracker `name`; None for `none`.

    A tracker that fails later is warned of once, and the run goes on without it. Raises InputError if it does not
    start.
    """
    if name == "none":
        yield None
        return
    with ExitStack() as stack:
        try:
            send: Send | None = stack.enter_context(TRACKERS[name].open(out, step, settings))
        except Exception as error:  # of many kinds: no account, no network
            raise InputError(f"track {name}: does not start ({brief(error)}); want it set up, or track none") from error

        def on_log(line: dict[str, Any]) -> None:
            nonlocal send
            if send is None:
                return
            try:
                send(line["step"], numbers(line))
            except Exception as error:
                send = None
                warnings.warn(f"track {name}: fails ({brief(error)}); the run goes on without it", stacklevel=2)

        yield on_log


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl but for the step; those of a list are NAME/0, NAME/1 and so on.

    >>> numbers({"step": 5, "loss": 0.5, "held_out_by_level": [0.25, None]})
    {'loss': 0.5, 'held_out_by_level/0': 0.25}
    """
    flat = dict[str, Any]()
    for name, value in line.items():
        flat |= {f"{name}/{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
    return {name: value for name, value in flat.items() if value is not None and name != "step"}


def _known(out: Path, name: str) -> str | None:
    """The tracker's own name of the run, if it has one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(parse_json((out / "track.json").read_bytes())[name])
    return None


def _remember(out: Path, name: str, run: str) -> None:
    known = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(parse_json((out / "track.json").read_bytes()))
    atomic.write_json(out / "track.json", {**known, name: run})


# -- the trackers ------------------------------------------------------------------------------------------------------


@contextmanager
def _wandb(out: Path, step: int, settings: Mapping[str, Any]) -> Iterator[Send]:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "ddpm")
    quiet = wandb.Settings(console="off")  # else it would take over standard output
    known = _known(out, "wandb") if step else None
    run = wandb.init(
        project=project, name=out.name, dir=str(out), config=dict(settings), id=known, resume="allow", settings=quiet
    )
    _remember(out, "wandb", run.id)
    there = run.step if run.resumed else 0  # lines before it are there already, and a resumed run repeats them
    with run:
        yield lambda at, values: run.log(values, step=at) if at >= there else None


@contextmanager
def _mlflow(out: Path, step: int, settings: Mapping[str, Any]) -> Iterator[Send]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, there, run = MlflowClient(), -1, _known(out, "mlflow") if step else None
    if run is not None:
        try:
            client.update_run(run, "RUNNING")
            for name in ("seconds", "held_out"):
                there = max([there, *(metric.step for metric in client.get_metric_history(run, name))])
        except Exception:  # it was deleted there
            run, there = None, -1
    if run is None:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ddpm")
        experiment = client.get_experiment_by_name(title)
        number = client.create_experiment(title) if experiment is None else experiment.experiment_id
        run = client.create_run(number, run_name=out.name).info.run_id
        client.log_batch(run, params=[Param(name, str(value)) for name, value in settings.items()])
        _remember(out, "mlflow", run)

    def send(at: int, values: dict[str, float]) -> None:
        if at > there:
            now = int(1000 * time.time())
            client.log_batch(run, metrics=[Metric(name, value, now, at) for name, value in values.items()])

    status = "FAILED"
    try:
        yield send
        status = "FINISHED"
    finally:
        with suppress(Exception):
            client.set_terminated(run, status)


@contextmanager
def _tensorboard(out: Path, step: int, settings: Mapping[str, Any]) -> Iterator[Send]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(out / "tensorboard", purge_step=step and step + 1) as board:  # later steps are trained again

        def send(at: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, at)

        yield send


TRACKERS = {
    "wandb": Tracker(_wandb, "wandb", meaning="Weights & Biases; WANDB_MODE=offline keeps all on this machine"),
    "mlflow": Tracker(_mlflow, "mlflow", meaning="MLflow; MLFLOW_TRACKING_URI says where"),
    "tensorboard": Tracker(_tensorboard, "tensorboard", meaning="TensorBoard's files in RUN/tensorboard"),
}
"""The trackers by name."""
