"""Small trainings in this process, and events during them, for several test files."""

from lightning.pytorch import Callback

from resnetv2_cli import run
from resnetv2_cli.config import Experiment
from resnetv2_cli.resume import continued
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.telling import silent
from resnetv2_cli.verify import differences

TINY = {
    "dataset": "digits", "depth": 8, "batch_size": 16, "steps": 12, "log_every": 3,
    "eval_every": 0.07, "save_every": 4, "precision": "32-true",
}  # fmt: skip


def trained_as(folder, tell=silent, display=(), resume=None, **settings) -> RunFolder:
    """Train in this process; ``resume``: the flags with which to continue a run."""
    folder = RunFolder(folder)
    if resume is None:
        experiment = Experiment(**{**TINY, **settings})
    else:
        experiment, _ = continued(folder, resume)
    run.train(experiment, folder, resume=resume is not None, display=list(display), tell=tell)
    return folder


class At(Callback):
    """Calls ``do`` after iteration ``step``."""

    def __init__(self, step, do) -> None:
        self.step, self.do = step, do

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.do()


def same(one: RunFolder, other: RunFolder) -> bool:
    return not any(differences(one, other).values())
