"""The wire: `fedge.proto`, the code generated from it, and `wire`, the one module that turns bytes into objects."""
