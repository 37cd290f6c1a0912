"""A faster start: keep torchmetrics from importing what it needs only for detection, audio and
plots, which no command here computes.

Lightning imports torchmetrics, which imports all of torchvision's networks, SciPy's signal
processing and matplotlib, if they are installed: as much work as all the rest of Lightning.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WHO = "torchmetrics"
UNUSED = ("matplotlib", "scipy", "torchvision")
ASKS = "lightning_utilities.core.imports"  # the module that it asks what is installed


class Lean(MetaPathFinder):
    """Finds torchmetrics once, and hides the packages in ``UNUSED`` while it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != WHO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            run = spec.loader.exec_module

            def run_alone(module: ModuleType) -> None:
                with uninstalled(UNUSED):
                    run(module)

            spec.loader.exec_module = run_alone  # type: ignore[method-assign]
        return spec


def start() -> None:
    """Have torchmetrics import less, unless it is already imported."""
    if WHO not in sys.modules and not any(isinstance(f, Lean) for f in sys.meta_path):
        sys.meta_path.insert(0, Lean())


@contextmanager
def uninstalled(names: Sequence[str]) -> Iterator[None]:
    """Within the context, tell Lightning's packages that ``names`` are not installed. Other code,
    and versions of those packages that ask in another way, get the true answer."""
    from importlib.metadata import PackageNotFoundError

    asked = importlib.import_module(ASKS)
    before = {n: getattr(asked, n) for n in ("_version", "package_available") if hasattr(asked, n)}

    def version(name: str) -> Any:
        if name in names:
            raise PackageNotFoundError(name)
        return before["_version"](name)

    def available(name: str) -> bool:
        return name not in names and before["package_available"](name)

    stand_ins: dict[str, Callable[..., Any]] = {"_version": version, "package_available": available}
    for name in before:
        setattr(asked, name, stand_ins[name])
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(asked, name, function)
        with suppress(AttributeError):  # it caches the answers
            asked.module_available.cache_clear()
