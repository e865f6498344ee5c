"""Trackers that people use, as thin as they can be. Each is imported when it is constructed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from normwise.monitor.finding import Finding

__all__ = ["MLflow", "TensorBoard", "Trackio", "WandB"]


def _imported(module: str, package: str, tracker: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"nw.trackers.{tracker} needs {package}: pip install {package}") from error


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


class TensorBoard:
    """Rows as scalars, findings as text, in TensorBoard.

    Args:
        folder: Where event files go (``log_dir``), or a ``SummaryWriter`` of your own, which is not closed.

    Raises:
        ValueError: ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Any) -> None:
        self._owned = not hasattr(folder, "add_scalar")
        self._writer = folder
        if self._owned:
            _imported("tensorboard", "tensorboard", "TensorBoard")
            self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finding(self, finding: Finding) -> None:
        """Write a finding as text."""
        self._writer.add_text(f"normwise/findings/{finding.kind}", str(finding), finding.step)

    def close(self) -> None:
        """Close the writer, if it is this tracker's own."""
        if self._owned:
            self._writer.close()


class WandB:
    """Rows and findings in a Weights & Biases run, under their names; steps as "normwise/step".

    Args:
        run: What ``wandb.init()`` returned. None: a run is made with ``options``, and finished at the end.
        options: For ``wandb.init``, such as ``project="gpt"`` or ``mode="offline"``.

    Raises:
        ValueError: ``wandb`` is not installed.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        self._wandb = _imported("wandb", "wandb", "WandB")
        self._run, self._options, self._owned = run, options, run is None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start the run if there is none, and note the settings."""
        if self._run is None:
            self._run = self._wandb.init(**self._options)
        self._run.config.update({"normwise": dict(settings)}, allow_val_change=True)
        self._run.define_metric("normwise/*", step_metric="normwise/step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        self._run.log({"normwise/step": step, **values})

    def finding(self, finding: Finding) -> None:
        """Alert about a finding that is new, and note it in the summary."""
        self._run.summary[f"normwise/findings/{finding.kind}"] = str(finding)

    def close(self) -> None:
        """Finish the run, if it is this tracker's own."""
        if self._owned and self._run is not None:
            self._run.finish()


class Trackio:
    """Rows and findings in trackio.

    Args:
        options: For ``trackio.init``, such as ``project="gpt"``.

    Raises:
        ValueError: ``trackio`` is not installed.
    """

    def __init__(self, **options: Any) -> None:
        self._trackio = _imported("trackio", "trackio", "Trackio")
        self._options = {"project": "normwise", **options}
        self._run: Any = None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start the run."""
        self._run = self._trackio.init(**{"config": {"normwise": dict(settings)}, **self._options})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        self._run.log(_finite(values), step=step)

    def finding(self, finding: Finding) -> None:
        """Log a finding as text."""
        self._run.log({f"normwise/findings/{finding.kind}": str(finding)}, step=finding.step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


class MLflow:
    """Rows as metrics and findings as tags of an MLflow run.

    Args:
        run_id: The run. None: the active one, or a new one, which is ended at the end.

    Raises:
        ValueError: ``mlflow`` is not installed.
    """

    def __init__(self, run_id: str | None = None) -> None:
        _imported("mlflow", "mlflow-skinny", "MLflow")
        self._client = importlib.import_module("mlflow.tracking").MlflowClient()
        self._mlflow = importlib.import_module("mlflow")
        self._run_id, self._owned = run_id, False

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Find or start the run."""
        if self._run_id is None:
            active = self._mlflow.active_run()
            self._owned = active is None
            self._run_id = (active or self._mlflow.start_run()).info.run_id
        self._client.log_dict(self._run_id, dict(settings), "normwise.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row, in as few requests as MLflow takes."""
        import time

        entities = importlib.import_module("mlflow.entities")
        now = int(time.time() * 1000)
        metrics = [entities.Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics[start : start + 1000])

    def finding(self, finding: Finding) -> None:
        """Set a tag."""
        self._client.set_tag(self._run_id, _mlflow_name(f"normwise/findings/{finding.kind}"), str(finding))

    def close(self) -> None:
        """End the run, if it is this tracker's own."""
        if self._owned:
            self._mlflow.end_run()


def _mlflow_name(name: str) -> str:
    """Return a name of the letters that MLflow allows."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "-" for letter in name)
