"""Packaging. The metadata is in pyproject.toml; the tested versions are in constraints.txt."""

from setuptools import setup

setup()
