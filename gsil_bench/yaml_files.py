"""YAML that users write: recipes and spaces of tuning. A key that stands twice is refused, where YAML would keep the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gsil_bench.errors import UserError


class _OnceEach(yaml.SafeLoader):
    """A loader whose mappings have each key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As the base class; a repeated key raises."""
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:index]]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, where: str) -> Any:
    """What a file holds.

    Raises:
        OSError: it cannot be read.
        UserError: it is not YAML, or a key stands twice in one mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, _OnceEach)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
