"""`--track`: a tracker holds what metrics.jsonl holds, also after a run was stopped and resumed."""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics, train

from ddpm import catalog
from ddpm.errors import InputError
from ddpm.run import track


def curves(run: Path, name: str) -> dict[int, float]:
    """What metrics.jsonl says of a number, by step."""
    return {line["step"]: line[name] for line in metrics(run) if name in line}


def test_tensorboard(tmp_path: Path) -> None:
    """A resumed run writes the steps again that come after its checkpoint, and TensorBoard shows them once."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    assert train(run, "--steps", 3, "--track", "tensorboard") == 0
    assert train(run, "--steps", 5, "--track", "tensorboard") == 0
    board = event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss", "held_out", "lr"):
        by_step = {event.step: event.value for event in board.Scalars(name)}
        assert by_step == pytest.approx(curves(run, name))
        assert len(board.Scalars(name)) == len(by_step)


def wandb_history(file: Path) -> dict[int, dict[str, float]]:
    """Step -> values in W&B's file of an offline run. W&B's own process may end it later than the run ends."""
    deadline = time.monotonic() + 60
    while (by_step := _finished_history(file)) is None:
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.1)
    return by_step


def _finished_history(file: Path) -> dict[int, dict[str, float]] | None:
    """Its records, in LevelDB's format of a log; None if the record of its end is not there yet."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, by_step, ended = file.read_bytes(), 7, b"", dict[int, dict[str, float]](), False
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:  # the rest of a block
            at += left
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            if at > len(data):
                break  # cut off
            parsed = wandb_internal_pb2.Record.FromString(record)
            ended = ended or parsed.HasField("exit")
            record = b""
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in parsed.history.item}
            if items:
                by_step.setdefault(items.pop("_step", parsed.history.step.num), {}).update(items)
    return by_step if ended else None


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sync would send is what the log holds. The resumed run has the same name there."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    names = []
    for steps in (3, 5):
        assert train(run, "--steps", steps, "--track", "wandb") == 0
        names.append(json.loads((run / "track.json").read_text())["wandb"])
    assert names[0] == names[1]
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert [file.stem for file in files] == [f"run-{names[0]}"] * 2
    seen = [wandb_history(file) for file in files]
    for name in ("loss", "held_out", "grad_norm"):
        sent = {step: values[name] for part in seen for step, values in part.items() if name in values}
        assert sent == pytest.approx(curves(run, name))
    assert all(step > 3 for step in seen[1])


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped goes on in the same run of MLflow, and no step is there twice."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    assert train(run, "--steps", 3, "--track", "mlflow") == 0
    assert train(run, "--steps", 5, "--track", "mlflow") == 0
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("ddpm")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["width"] == "32"
    for name in ("loss", "held_out", "grad_norm"):
        history = client.get_metric_history(found.info.run_id, name)
        assert {one.step: one.value for one in history} == pytest.approx(curves(run, name))
        assert len({one.step for one in history}) == len(history)


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def fails(*_: Any) -> Iterator[Any]:
        raise ConnectionError("no\naccount")
        yield

    monkeypatch.setitem(track.TRACKERS, "wandb", track.Tracker(fails, "json", meaning=""))
    with (
        pytest.raises(InputError, match=r"track wandb: does not start \(no account\)"),
        track.tracker("wandb", tmp_path, 0, {}),
    ):
        pass


def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is warned of once, and all lines are in the log."""
    calls = []

    @contextmanager
    def fails(*_: Any) -> Iterator[Any]:
        def send(step: int, values: dict[str, float]) -> None:
            calls.append(step)
            raise ConnectionError("gone")

        yield send

    monkeypatch.setitem(track.TRACKERS, "mlflow", track.Tracker(fails, "json", meaning=""))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with track.tracker("mlflow", tmp_path, 0, {}) as send:
            assert send is not None
            send({"step": 1, "loss": 1.0})
            send({"step": 2, "loss": 1.0})
    assert [str(one.message) for one in seen] == ["track mlflow: fails (gone); the run goes on without it"]
    assert calls == [1]
    assert train(tmp_path / "run", "--steps", 2, "--track", "mlflow") == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]


@pytest.mark.parametrize("name", catalog.trackers())
def test_a_missing_package_is_one_line_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = track.TRACKERS[name].package
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda wanted: None)
    assert train(tmp_path / "run", "--steps", 1, "--track", name) == 2
    line = f"ddpm: {package} is not installed; want `pip install 'ddpm-kit[{name}]'`\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "run").exists()
