"""Adapters: read, checked, compiled into runtime forms, kept in slots. Knows nothing of HTTP or scheduling."""
