"""Other people's rules and attacks, to hold ours against."""

import sys
import types

# Its package imports benchmarks that the rules do not need, and those torchvision, of which there is no CPU build.
sys.modules.setdefault("byzfl.benchmark", types.ModuleType("byzfl.benchmark"))

import byzfl  # noqa: E402

__all__ = ["byzfl"]
