"""The operations of the fast forward pass (model/llama_fused.py) on a GPU: addresses in, 16-byte accesses, no arrays.

    rows.py        gather, RMSNorm, gate, residual and rows kept: what works on one row at a time
    rope_write.py  rotary embedding and the cache write in one pass over a row
    greedy.py      argmax over the vocabulary in two steps
    operations.py  the operations themselves: which kernels each one launches for how many rows
    numpy_twin.py  the same operations as compositions of the NumPy twins: their definition, and their oracle

Each kernel can take part in programmatic dependent launch (driver.py). The simple version of everything here is the
file of the same operation one folder up.
"""
