"""Pure algorithms, each a small file named after its paper's method: data, `init` and `step`.

Never does IO, reads a clock, starts a thread or imports gRPC. The contracts are in `contracts.py`.
"""
