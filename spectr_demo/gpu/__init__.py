"""Speed on a GPU: torch operators that do in one launch what routing in torch does in many.

`operators` holds them. `kernels` is their Triton code, imported only where it
runs. `reference` says in torch what they compute. Nothing here imports the engine.
"""
