"""Makes torchvision's transforms importable where its compiled operators are not.

PyPI's torchvision is compiled for a torch with CUDA. Beside a CPU torch its import ends at the
first operator that it describes, and takes all models of transformers with it, since they look at
images through it. What transformers uses of it is Python and needs none of these operators.

Processes of a run start in many ways (ranks, workers, fork servers) and unpickle things first, so
the one place that all of them pass is the import of this package.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any, Final

NAME: Final = "torchvision"
MISSING: Final = "operator torchvision::nms does not exist"


class TorchvisionFinder:
    """A meta path finder: finds torchvision where Python does, for `TorchvisionLoader`."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """None for every other module, which leaves it to the others."""
        if fullname != NAME:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is None or found.origin is None:
            return None
        return spec_from_file_location(
            fullname,
            found.origin,
            loader=TorchvisionLoader(fullname, found.origin),
            submodule_search_locations=found.submodule_search_locations,
        )


class TorchvisionLoader(SourceFileLoader):
    """Runs torchvision as it is, and without its operators where just these are missing."""

    def exec_module(self, module: ModuleType) -> None:
        """Import torchvision.

        Raises:
            RuntimeError: Anything else is wrong with it.
        """
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if str(error) != MISSING:
                raise
            self._exec_without_operators(module)

    def _exec_without_operators(self, module: ModuleType) -> None:
        import torch

        from omnilit.logging import get_logger

        for name in [name for name in sys.modules if name.startswith(f"{NAME}.")]:
            del sys.modules[name]  # what was imported before the error
        library: Any = torch.library
        register = library.register_fake

        def register_others(op: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(op, str) and op.startswith(f"{NAME}::"):
                return _keep
            return register(op, *args, **kwargs)

        library.register_fake = register_others
        try:
            with warnings.catch_warnings():
                # its readers of images, for which we have Pillow
                warnings.filterwarnings("ignore", "Failed to load image Python extension")
                super().exec_module(module)
        finally:
            library.register_fake = register
        get_logger(__name__).info(
            "torchvision: it is compiled for another build of torch (%s); its transforms are used, "
            "its operators are not there",
            torch.__version__,
        )


def _keep(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def install_finder() -> TorchvisionFinder:
    """Let `TorchvisionFinder` look before Python's own finders; there is one of it."""
    for finder in sys.meta_path:
        if isinstance(finder, TorchvisionFinder):
            return finder
    finder = TorchvisionFinder()
    sys.meta_path.insert(0, finder)
    return finder
