"""Sessions on onnxruntime alone, with weights that stay in the page cache."""
