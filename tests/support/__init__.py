"""Builders shared by the tests: ``from tests.support.models import tiny_model``.

Works under ``--import-mode=importlib`` without the repository's root on ``sys.path`` because ``tests/`` and
``tests/support/`` are packages (they have an ``__init__.py``): pytest imports ``tests`` itself before any conftest.
"""
