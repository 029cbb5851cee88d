"""Inference on devices: split and early-exit models, tensor-parallel language models, the cloud side.

Never imports `fedge.server`, and needs no torch on a device; a device that only infers needs no onnx either. The parts
are `bundle` (the folder that is deployed), `split` (where a graph can be cut, and what that takes), `coding` (tensors
as bytes), `exits` (rules, calibration, training), `runtime` (sessions that hold little memory), `plan` (what to run
where) and `cloud` (tails over gRPC, and the session of a device that falls back by itself).
"""
