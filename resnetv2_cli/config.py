"""One experiment, complete and checked."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import yaml

from resnetv2_cli import plans
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import UserError
from resnetv2_cli.options import OF_FILES, PAPER_STEPS, PAPER_WARMUP, Options
from resnetv2_cli.recipes import asked_for, made
from resnetv2_cli.settings import checked, drops
from resnetv2_cli.weightfile import find, sha256


@dataclass(frozen=True, kw_only=True)
class Experiment(Options):
    """All settings of one training run.

    Raises:
        UserError: a setting has an invalid value, or two do not go together.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, checked(f, getattr(self, f.name)))
        plans.check_shortcut(self.shortcut, self.settings)
        if self.batch_size < self.accumulate:
            raise UserError(
                f"the batch of {self.batch_size} cannot be split into {self.accumulate} parts",
                "--accumulate says how many micro-batches make a batch",
            )
        drops(self.drops)
        if self.nesterov and not self.momentum:
            raise UserError("Nesterov's momentum needs a momentum", "--momentum 0.9")
        plans.units_per_stage(self.depth, self.block_, self.stem_)
        plans.check_frozen(self.freeze_, self.stem_)
        self._check_images()
        self._check_start()

    def _check_images(self) -> None:
        for f in fields(self):
            given = getattr(self, f.name)
            if f.name in OF_FILES and given != f.default and DATASETS[self.dataset].decoded:
                raise UserError(
                    f"{f.name} {given} is for larger images than those of {self.dataset}",
                    f"leave it out, or say --{f.name} {f.default}",
                )

        if self.color != "none" and not self.augment:
            hint = "leave out --no-augment, or say --color none"
            raise UserError(f"color {self.color} is an augmentation, and there is none", hint)

    def _check_start(self) -> None:
        if self.weights and not self.weights_sha256:
            # What is learned depends on the bytes of the file, not on its place.
            object.__setattr__(self, "weights_sha256", sha256(find(Path(self.weights))))
        if self.weights_sha256 and not self.weights:
            hint = "--weights names the file with this SHA-256"
            raise UserError("weights_sha256 is given, and no weights are", hint)
        if self.freeze_ and not self.weights:
            hint = "--weights says where its weights come from"
            raise UserError("frozen layers would stay random", hint)

    @property
    def freeze_(self) -> tuple[str, ...]:
        """The parts that are frozen."""
        return tuple(part.strip() for part in self.freeze.split(",") if part.strip())

    @property
    def stem_(self) -> str:
        """The stem: as given, or the dataset's."""
        return self.stem or ("cifar" if DATASETS[self.dataset].decoded else "imagenet")

    @property
    def block_(self) -> str:
        """The block: as given, or the default for the depth."""
        return self.block or plans.default_block(self.depth, self.stem_)

    @property
    def option_(self) -> str:
        """The option where the shape changes: as given, or the default for block and stem."""
        return self.option or plans.default_option(self.block_, self.stem_)

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols by which photographs are evaluated; training uses the first."""
        return tuple(self.protocol.split(","))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of shortcuts that were given."""
        every = {name for row in plans.shortcuts().values() for name in row.settings}
        names = [f.name for f in fields(self) if f.name in every]
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def shortcut_settings(self) -> dict[str, Any]:
        """The shortcut's settings, defaults filled in; for one of the user's own, which is not
        imported for this, only those that are given outside its name."""
        row = plans.shortcuts().get(self.shortcut)
        return (row.settings if row else {}) | self.settings

    @property
    def own(self) -> dict[str, str]:
        """Code of the user's own, ``module:Class``, by setting: unit, shortcut, both or neither."""
        return {n: name for n in plans.OWN if ":" in (name := getattr(self, n))}

    @property
    def architecture(self) -> dict[str, Any]:
        """The arguments of ``ResNet``, except ``classes``."""
        names = "depth unit shortcut pad stride_on first_act init settings".split()
        defaults = {"block": self.block_, "stem": self.stem_, "option": self.option_}
        return {n: getattr(self, n) for n in names} | defaults

    @property
    def drops_(self) -> tuple[float, ...]:
        """The fractions of the training at which the learning rate drops."""
        return drops(self.drops)

    @property
    def name(self) -> str:
        """``cifar10-resnet110-basic-full-preact-s0``: the block always follows the depth."""
        given = [f"{v:g}" for v in self.settings.values()]
        parts = [self.dataset, f"resnet{self.depth}", self.block_, plans.in_names(self.unit)]
        if self.shortcut != "identity":
            parts.append(plans.in_names(self.shortcut))
        return "-".join([*parts, *given, f"s{self.seed}"])

    @property
    def warmup_(self) -> int:
        """Iterations of warm-up: 400 of 64,000, or 30 % of a one-cycle schedule, unless given."""
        if self.warmup is not None:
            return self.warmup
        if self.schedule == "one-cycle":
            return round(0.3 * self.steps)
        return round(PAPER_WARMUP * self.steps / PAPER_STEPS)

    def settle(self, steps_per_epoch: int) -> Self:
        """The same experiment with ``epochs`` turned into ``steps``.

        Raises:
            UserError: the warm-up would be longer than the training.
        """
        steps = self.steps if self.epochs is None else max(1, round(self.epochs * steps_per_epoch))
        if (self.warmup or 0) > steps:
            said = f"the warm-up of {self.warmup} is longer than the {steps} iterations"
            raise UserError(said, "give a shorter --warmup with shorter training")
        return replace(self, steps=steps, epochs=None)

    @classmethod
    def asked(cls, path: Path | str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a config file, if there is one, and ``overrides`` have: those that are
        not left at their defaults.

        Raises:
            UserError: as ``load``, unless it is a value that is wrong.
        """
        return asked_for(path, overrides, [f.name for f in fields(cls)])

    @classmethod
    def load(cls, path: Path | str | None = None, /, **overrides: Any) -> Self:
        """Read a config file; ``overrides`` win over it, it wins over the defaults.

        A name without a folder is looked for in ``configs/`` too. ``layout`` stands for the
        settings of its row, both in a file and among the overrides.

        Raises:
            UserError: the file is missing or not a YAML mapping, or has a key that is no field.
        """
        return made(cls, path, overrides, [f.name for f in fields(cls)])

    def dump(self) -> str:
        """The whole experiment as YAML: what a run folder keeps, and what reproduces the run."""
        return yaml.safe_dump(asdict(self), sort_keys=False)
