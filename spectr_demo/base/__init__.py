"""The base model: loaded in 4 bits, its prompts, its memory and its files."""
