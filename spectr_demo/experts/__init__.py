"""LoRA experts: reading and checking adapters, the library of them, what it is made of."""
