"""A Llama-family language model across small devices, and with a cloud model behind it.

Ranks share every layer (tensor parallelism, TPI-LLM, arXiv 2410.00531): each holds some heads and some columns of the
feed-forward network, and two all-reduces per layer keep them together. The parts are `config`, `folder` and `tokenizer`
(what a Hugging Face folder holds), `shares`, `shard` and `planner` (who holds what), `kernels` and `window` (how a rank
multiplies, and what of its weights is in memory), `rank` (the forward pass), `mesh` and `collectives` (how ranks talk),
`scheduler`, `sampler` and `engine` (many requests at a time), `group` (who is there), `http` (OpenAI's protocol) and
`collab` (early exits and a cloud model, CE-CoLLM). Never needs torch on a device, though two kernels may use it; never
imports `fedge.server`.
"""
