"""Tell ``transformers`` about gemq once transformers is imported, before or after this. Standard library only.

Entries in the tables of transformers' quantizers stand for the two classes of :mod:`gemq.hf`, which is imported when
the first gemq checkpoint is loaded: a program that loads none pays nothing. ``import gemq`` imports this file, and
``gemq auto-import on`` writes a copy of it into site-packages for programs that never import gemq. If gemq has been
removed since, the copy makes no entry.
"""

import sys

# for type checkers alone: the copy runs at every start of Python, which typing would slow down
TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import Any

_MODULE = "transformers.quantizers.auto"
# table of that module -> class of gemq.hf
_TABLES = {"AUTO_QUANTIZER_MAPPING": "GemqQuantizer", "AUTO_QUANTIZATION_CONFIG_MAPPING": "GemqConfig"}


class _StandIn:
    """Forwards to a class of :mod:`gemq.hf`. Raises ``ImportError`` if gemq is broken."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> "Any":
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> "Any":
        try:
            import gemq.hf
        except Exception as error:
            raise ImportError(
                f"this is a gemq checkpoint, and gemq could not be imported ({type(error).__name__}: {error})"
            ) from error
        return getattr(gemq.hf, self._name)


def _enter(module: object) -> None:
    for table, name in _TABLES.items():
        getattr(module, table, {}).setdefault("gemq", _StandIn(name))


class _Finder:
    """Waits for the import of transformers' tables."""

    waits_for_transformers = True

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        if name != _MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        import importlib.util

        try:
            spec: Any = importlib.util.find_spec(name)
            if importlib.util.find_spec("gemq") is not None:
                spec.loader = _Loader(spec.loader)
            return spec
        except Exception:
            return None


class _Loader:
    """Loads as the loader that it wraps, and makes the entries after it."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "Any":
        return self._loader.create_module(spec)

    def exec_module(self, module: "Any") -> None:
        self._loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self._loader
        _enter(module)


def install() -> None:
    """Make the entries now if transformers' tables are there, else when they are imported."""
    if _MODULE in sys.modules:
        _enter(sys.modules[_MODULE])
    elif not any(getattr(finder, "waits_for_transformers", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
