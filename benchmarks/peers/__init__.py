"""The comparison with weft's peers: what is run, the process of each system, and the report (``bench_peers.py``)."""
