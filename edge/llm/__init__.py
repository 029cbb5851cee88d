"""A Llama-family language model across small devices, and with a cloud model behind it.

Ranks share every layer (tensor parallelism, TPI-LLM, arXiv 2410.00531): each holds some heads and some columns of the
feed-forward network, and two all-reduces per layer keep them together. The parts are `models` (what a Hugging Face
folder holds), `shards` (who holds what), `compute` (products, and what of the weights is in memory), `ranks` (the
forward pass), `mesh` (how machines talk), `engine` (many requests at a time), `group` (who is there), `api` (OpenAI's
protocol) and `collab` (early exits and a cloud model, CE-CoLLM). Never needs torch on a device, though some kernels may
use it; never imports `fedge.server`.
"""
