"""The folders server/, kernels/ and adapters/ are installed as weft.server, weft.kernels and weft.adapters.

All other metadata is in pyproject.toml. `weft` itself is a namespace package without an __init__.py.
"""

from setuptools import find_packages, setup

ROOTS = ("server", "kernels", "adapters")

setup(
    packages=[f"weft.{name}" for name in find_packages(include=[g for root in ROOTS for g in (root, f"{root}.*")])],
    package_dir={f"weft.{root}": root for root in ROOTS},
)
