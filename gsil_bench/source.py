"""Which source a loss or a scorer consists of, so that editing it makes new artefacts instead of serving old ones."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

INSTALLED = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
SUITE = Path(__file__).parent


def source_sha256(*module_names: str) -> str:
    """Digest of modules' sources and of the user's modules that they import, directly or through each other.

    Imports are found in the text and located without regard to what happens to be loaded, so the digest does not change while a
    process runs. Installed packages are left out: after an upgrade of a plug-in, start with a fresh OUT.
    """
    sources: dict[str, str] = {}
    for name in module_names:
        _collect(name, sources)
    return hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sorted(sources.items())).encode()).hexdigest()


def _collect(name: str, sources: dict[str, str]) -> None:
    path = _file(name)
    if name in sources or path is None:
        return
    sources[name] = path.read_text(encoding="utf-8")
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for imported in _imports(sources[name], package):
        if not _is_foreign(_file(imported.partition(".")[0])) and not _is_foreign(_file(imported)):
            _collect(imported, sources)


def _file(name: str) -> Path | None:
    """The source of a module, loaded or not; None for what is no module, or has no source."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None and name not in sys.modules:
        try:
            spec = importlib.util.find_spec(name)
        except Exception:  # looking for a submodule imports its package, which may raise anything
            return None
        file = spec.origin if spec is not None else None
    return Path(file) if file and file.endswith(".py") else None


def _is_foreign(path: Path | None) -> bool:
    """Installed packages, and this suite: its own modules are covered by the stages' version numbers."""
    return path is None or str(path).startswith(INSTALLED) or SUITE in path.parents or any(map(_is_target, path.parents))


@lru_cache
def _is_target(folder: Path) -> bool:
    """Whether packages were installed into a folder, an environment's or `pip install --target`'s."""
    return folder.name in ("site-packages", "dist-packages") or next(folder.glob("*.dist-info"), None) is not None


@lru_cache
def _imports(text: str, package: str) -> tuple[str, ...]:
    """Names that may be modules: `import a.b`, `from a import b` (a and a.b), relative ones resolved."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            absolute = importlib.util.resolve_name(base, package) if node.level else base
            names += [absolute, *(f"{absolute}.{alias.name}" for alias in node.names)]
    return tuple(dict.fromkeys(names))
