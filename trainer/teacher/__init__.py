"""Annotation of problems: a teacher model writes the solution steps, and this package checks them."""
