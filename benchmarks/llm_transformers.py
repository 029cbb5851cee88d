"""transformers without torchvision, which it would load for images it never sees here.

Of torchvision there is no CPU build to install beside torch's, and one that does not fit must not matter. Owns that
import. Must never be imported where nobody asks for transformers: it takes seconds.
"""

import sys

sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]

import transformers

__all__ = ["transformers"]
