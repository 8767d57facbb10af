"""Where else a run can be followed: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rae.training.reports.display import Row

WANDB_ID_FILE = "wandb_id.txt"


class Tracker(Protocol):
    """`start` says after how many steps a run begins; what was told of later ones comes again.

    OSErrors end no run.
    """

    @property
    def name(self) -> str: ...

    def start(self, step: int) -> None: ...

    def show(self, row: Row) -> None: ...

    def samples(self, step: int, grid: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`. Raises ImportError that names the extra to install."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard is not installed: pip install 'rae-server[report]'"
            ) from error
        self.make = SummaryWriter
        self.folder = folder
        self.writer: Any = None

    def start(self, step: int) -> None:
        self.writer = self.make(str(self.folder), purge_step=step + 1)

    def show(self, row: Row) -> None:
        for name, value in row.values().items():
            if name != "step":
                self.writer.add_scalar(name, value, row.step)

    def samples(self, step: int, grid: Image.Image) -> None:
        self.writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of `project`, which a resumed one goes on with. Its rows have their own `step`: W&B
    takes none that is not above the last, and a resumed run goes back.

    Raises ImportError that names the package to install.
    """

    name = "W&B"

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("W&B is not installed: pip install wandb") from error
        self.wandb: Any = wandb
        self.folder, self.project, self.config = folder, project, config
        self.run: Any = None

    def start(self, step: int) -> None:
        self.run = self.wandb.init(
            project=self.project,
            name=self.folder.name,
            dir=str(self.folder),
            id=self._id(),
            resume="allow",
            config=dict(self.config),
            settings=self.wandb.Settings(console="off"),  # the bar is no log
        )
        self.run.define_metric("*", step_metric="step")

    def _id(self) -> str:
        path = self.folder / WANDB_ID_FILE
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        return path.read_text().strip()

    def show(self, row: Row) -> None:
        self._log(row.values())

    def samples(self, step: int, grid: Image.Image) -> None:
        self._log({"step": step, "samples": self.wandb.Image(grid)})

    def _log(self, values: Mapping[str, Any]) -> None:
        try:
            self.run.log(values)
        except self.wandb.Error as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        self.run.finish()
