"""Shape annotations: jaxtyping where it is installed (development, tests), plain arrays elsewhere (a device).

`Float[np.ndarray, "batch seq"]` reads the same in both worlds; only tests pay for the check.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Int
else:
    try:
        from jaxtyping import Float, Int
    except ImportError:

        class _PlainArray:
            def __getitem__(self, annotation: Any) -> Any:
                return annotation[0]

        Float = Int = _PlainArray()

__all__ = ["Float", "Int"]
