"""Inference on devices: split and early-exit models, tensor-parallel language models, the cloud side.

Never imports `fedge.server`, and needs no torch on a device. Its first tenants arrive with split inference.
"""
