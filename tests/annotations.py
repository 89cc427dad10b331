"""Verifies hosl's annotations, shapes among them, on every call in tests; pytest loads it before anything of hosl."""

from pathlib import Path

import jaxtyping

_SRC = Path(__file__).parents[1] / "src"
_UNCHECKED = "hosl.parties.engine.perturbation"
"""Defines its forwards anew in every probe; compiling their checks each time was most of the suite's time."""


def _checked_modules():
    """All but that one; a package's name covers what is below it, so its packages are left out."""
    paths = [path.relative_to(_SRC).with_suffix("").parts for path in _SRC.rglob("*.py")]
    names = {".".join(parts).removesuffix(".__init__") for parts in paths}
    return sorted(name for name in names if not f"{_UNCHECKED}.".startswith(f"{name}."))


jaxtyping.install_import_hook(_checked_modules(), "beartype.beartype")
