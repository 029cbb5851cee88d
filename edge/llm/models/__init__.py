"""What a Hugging Face folder holds: sizes, weights, rotary positions, tokenizer, chat template."""
