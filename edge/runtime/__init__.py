"""The device's runtime: pieces on onnxruntime alone, with weights that stay in the page cache, and their measurement.

`sessions` opens and runs pieces, `cache` keeps them optimised, `tensors` checks what goes in; `measure`, `operators`,
`nodes` and `memory` find out what pieces cost.
"""
