"""What is asked for: the recipe's schema, its makes, and what is wrong with one."""
