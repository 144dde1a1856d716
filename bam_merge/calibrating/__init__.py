"""Routers made of texts: which texts, what a model makes of them, and the rule that gives a router's rows."""
