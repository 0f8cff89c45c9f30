"""What an expert is worth: tasks with held-out examples and scorers that need no judge."""
