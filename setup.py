"""Packages of the distribution: `kernels/` at the top of the tree is installed as `sra_fast.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=["sra_fast.kernels", *find_packages(include=["sra_fast", "sra_fast.*"])],
    package_dir={"sra_fast": "sra_fast", "sra_fast.kernels": "kernels"},
)
