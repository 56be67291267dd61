"""Pure functions of tensors: one package per op, each with a torch reference and a Triton kernel of the same signature.

Nothing here knows what an adapter or a request is. Batch metadata (`RowGroups`, `AttentionRows`) is built once per step
on the host and shared by every layer.
"""
