"""Exchange with Hugging Face, and growing checkpoints on disk.

Safetensors in and out, no pickle; nothing is held in memory that can be streamed.
"""

from stacking_jax.interop.export import export_params, export_run
from stacking_jax.interop.grow_folder import grow_folder, stored_depth
from stacking_jax.interop.importing import import_folder, import_params

__all__ = [
    "export_params", "export_run", "grow_folder", "import_folder", "import_params",
    "stored_depth",
]
