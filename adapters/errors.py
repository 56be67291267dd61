"""What can be wrong with an adapter.

AdapterError                 base of the tree; carries the field or tensor it is about
├── AdapterFormatError       the files cannot be read as an adapter: missing, truncated, malformed, a pickle
├── AdapterUnsupported       well-formed, but weft cannot serve it exactly; names the option that prevents it
├── BaseWeightsNeeded        compiling it needs the weights of the base, and only its shape is known
├── AdapterMismatch          does not fit the base model: unknown module, wrong shape, missing or extra tensor
├── AdapterSourceError       the source cannot be resolved or is not allowed
├── AdapterTooLarge          does not fit into the memory set aside for adapters
└── NotComposable            adapters that cannot be weighed against each other as was asked
"""

from __future__ import annotations


class AdapterError(Exception):
    """An adapter that cannot be served. ``param`` names the config field, tensor or argument at fault."""

    code = "adapter_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class AdapterFormatError(AdapterError):
    """The files are not a readable adapter."""

    code = "adapter_format"


class AdapterUnsupported(AdapterError):
    """The adapter uses something that cannot be served exactly."""

    code = "adapter_unsupported"


class BaseWeightsNeeded(AdapterError):
    """The adapter's forms follow from the weights of the base, which are not loaded."""

    code = "base_weights_needed"


class AdapterMismatch(AdapterError):
    """The adapter does not fit the base model."""

    code = "adapter_mismatch"


class AdapterSourceError(AdapterError):
    """The source of an adapter cannot be resolved, or must not be read."""

    code = "adapter_source"


class AdapterTooLarge(AdapterError):
    """The adapter does not fit into the memory set aside for adapters."""

    code = "adapter_too_large"


class NotComposable(AdapterError):
    """Adapters that cannot be composed as was asked. ``member`` is the place of the one that prevents it."""

    code = "not_composable"

    def __init__(self, message: str, *, param: str | None = None, member: int | None = None) -> None:
        super().__init__(message, param=param)
        self.member = member
