"""Builds the package; the compiled libraries are optional, their absence is one logged line with the reason."""

from setuptools import setup

setup()
