"""Which source a loss or a scorer consists of, so that editing it makes new artefacts instead of serving old ones."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import ModuleType

INSTALLED = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
SUITE = Path(__file__).parent
"""Our own modules below a loss (records, errors) are covered by the stages' version numbers."""


def source_sha256(module_name: str) -> str:
    """Digest of a module's source and of the user's modules that it imports, directly or through each other."""
    sources: dict[str, str] = {}
    _collect(module_name, sources)
    return hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sorted(sources.items())).encode()).hexdigest()


def _collect(name: str, sources: dict[str, str]) -> None:
    module = sys.modules.get(name)
    path = _file(module) if module is not None else None
    if name in sources or module is None or path is None:
        return
    sources[name] = path.read_text(encoding="utf-8")
    for imported in _imports(sources[name], module.__package__ or ""):
        other = _file(sys.modules[imported]) if imported in sys.modules else None
        if other is not None and not _is_foreign(other):
            _collect(imported, sources)


def _file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if file and file.endswith(".py") else None


def _is_foreign(path: Path) -> bool:
    """Installed packages and this suite change with versions that are recorded elsewhere."""
    return str(path).startswith(INSTALLED) or SUITE in path.parents


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
