"""Causal attention over the paged cache: softmax(scale * Q K^T) V, grouped heads, keys and values by block
table.

    numpy_twin.py       the definition, and the oracle of the rest

    prefill_simple.py   many query rows: tiles of keys with the online softmax; start here
    prefill.py          the same on tensor cores; in use for fewer rows, and on other GPUs
    prefill_wgmma.py    the same as compute capability 9.0 can do it, with prefill_layout.py, prefill_producer.py,
                        fragments.py and schedule.py; from 128 rows on
    decode_simple.py    one query row: the context split into parts, and the kernel that combines them
    decode.py           the same on tensor cores
    decode_registers.py the same as compute capability 9.0 can do it: nothing passes shared memory on its way. In use
                        there, with decode_tile.py; and how parts and warps are chosen
    combine.py          the parts of a split context into one
    cuda.py             which of them `attention` takes (the fused one: ../fused/operations.py)

    cpu.py              the CPU's kernel, with vectors.py for its inner loops

    rows.py             rows of the weights themselves, for whoever looks into the engine (tinyvllm/probe)
    pool.py             the same made small enough to send

All of them cut the context at fixed positions, counted from its first token, and add in that order. So what a
row gets from a kernel does not depend on how its prompt was cut into chunks, or on what was in the cache
already. Nor does it depend on the batch around it, but for decode_registers.py: there how many the requests are, and
how long the longest is beside the others, says how long the parts are, unless FusedOperations.batch_invariant fixes
them. (On the GPU, prefill and decode cut differently: the last bits of a row depend on which of the two computed it.)
"""
