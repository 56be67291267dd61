"""The engine in its own process: supervised, restarted, its adapters replayed."""
