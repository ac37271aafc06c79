"""Annotation of problems with solution steps that a teacher model writes and this package checks."""
