"""Where a graph falls into a head and a tail, and the files that this takes (needs onnx; never on a device)."""
