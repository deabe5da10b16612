"""Matrix products, in steps: `linear` of every backend, out = bf16(x @ weight.T + bias) with a float32 sum.

    numpy_twin.py    the definition, and the oracle of the rest

    naive.py         GPU step 1: one thread an output; memory traffic is all there is
    tiled.py         GPU step 2: tiles in shared memory; each value is read once a tile
    tensor_core.py   GPU step 3: mma.sync fed by asynchronous copies; in use for more rows
    gemv.py          few rows: a race to read the weights; in use up to 2 or 8 rows
    cuda.py          which of them `linear` takes
    few_rows.py      up to 8 rows with what comes before and after the product (fused/operations.py)
    skinny.py        5 to some hundred rows, wgmma with the sides swapped (compute capability 9.0);
                     skinny_output.py: what comes after the product
    wgmma.py         more, fed by the copy engine (compute capability 9.0)
    cublas.py        NVIDIA's library, for comparison

    cpu.py           the CPU's kernel; packing.py: the layout of its weights, tile.py: its inner loop
"""
