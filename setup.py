"""The metadata stands in setup.cfg."""

import setuptools

setuptools.setup()
