"""Who is who: tables of tensor names and roles, the vocabulary of configurations, and what a model costs."""
