"""The coordinator: the sans-IO federation machine (`machine/`) and its shell over gRPC, journal and clock.

Never imports torch or onnx.
"""
