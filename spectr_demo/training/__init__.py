"""Training an expert: the recipe, what it costs, the model card."""
