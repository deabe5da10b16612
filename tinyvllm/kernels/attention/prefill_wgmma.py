"""Prefill attention on compute capability 9.0: wgmma fed by the copy engine. prefill.py explains the algorithm.

A row is (token, head of the group): CONSUMERS * 64 rows are TOKENS neighbouring tokens with the query heads that
share one key head, and all of them use each tile of KEYS keys. Blocks stay; each takes tile of rows after tile of rows
in the order of schedule.py, longest first. In a block

    producer    a warp finds out what is next, and keeps queries and up to STAGES tiles of keys and of values on
                their way. A page of the cache is a box of the copy engine: each lane follows the block table to
                its page, and in shared memory they stand in order (prefill_producer.py, prefill_layout.py)
    consumers   warpgroups of 64 rows. Scores, weights and outputs never leave their registers (fragments.py)

The tensor cores are to be busy while a warpgroup computes exponentials, so a consumer begins the next tile's scores
together with this tile's outputs, and works on the scores as soon as they are there (keys go from the last tile,
which has the mask, down to the first):

    products      S(3) | S(2)  O += P(3) V(3) | S(1)  O += P(2) V(2) | S(0)  O += P(1) V(1) | O += P(0) V(0)
    the lanes           P(3)          P(2)           P(1)           P(0)

and other warpgroups of the multiprocessor, which are elsewhere in their tiles, fill what gaps remain. (The assembler
brings the wait for O forward again, ahead of P's arithmetic; held back by force it was no faster: ../IDEAS.md. What
counts is how few instructions there are beside the products: see same_in_warp.)

Barriers, each with a phase bit that flips once it is complete: for the queries (two buffers), keys and values (STAGES
each) one that what was asked for has arrived, and one that all warps of the consumers are done with it.

What lies past a sequence's end in its last page may be anything, and 0 * NaN is NaN: scores there are masked, and
consumers overwrite those values with zeros in shared memory. Pages past the end are not fetched.

A row's sums are taken from its last tile of keys down, and tiles start at multiples of KEYS: they do not depend on
how its prompt was cut. Tiles beyond its position change nothing, as P is 0 there.

Sources: Shah et al., "FlashAttention-3" (2024); NVIDIA, "Parallel Thread Execution ISA".
"""

import functools

import numpy as np

from tinyvllm.kernels.attention.fragments import (
    add_values,
    exponentials,
    mask_scores,
    multiply_keys,
    pack_pairs,
    row_maxima,
    row_sums,
    scale_rows,
)
from tinyvllm.kernels.attention.prefill_layout import can_run, choose_shape, make_layout
from tinyvllm.kernels.attention.prefill_output import make_store
from tinyvllm.kernels.attention.prefill_producer import make_producer, next_buffer, next_stage
from tinyvllm.kernels.cuda_support import cuda, device_function, kernel
from tinyvllm.kernels.hopper import (
    barrier_arrive_where_0,
    barrier_init,
    barrier_wait,
    barriers_ready,
    descriptor,
    group_barrier,
    multiply_wait,
    shared_to_engine,
    zeros,
)
from tinyvllm.kernels.ptx import (
    dynamic_shared,
    exp2,
    lane_index,
    load_shared_16_bytes,
    maximum,
    reciprocal,
    same_in_warp,
    shuffle_xor,
    store_shared_16_bytes,
    thread_index,
)

__all__ = ["prefill_wgmma_kernel", "can_run", "choose_shape"]

# maps of queries, keys, values; out, block_tables, seq_lens, query_start_loc; sizes
SIGNATURE = ("uint64",) * 7 + ("int32", "int32", "int32", "float32", "int32", "int32")
LOWEST = np.float32(-1e30)  # below every score; finite, because minus infinity less itself is NaN
ZERO = np.float32(0)


@functools.cache
def prefill_wgmma_kernel(D: int, GROUP: int, BLOCK: int, CONSUMERS: int, KEYS: int, STAGES: int, MIN_BLOCKS: int):
    """The kernel for head_dim D, GROUP query heads a key head and pages of BLOCK tokens; see choose_shape.

    Grid: at most MIN_BLOCKS blocks a multiprocessor.
    """
    L = make_layout(D, GROUP, BLOCK, CONSUMERS, KEYS, STAGES)
    SCORES, OUTPUTS = KEYS // 2, D // 2  # registers
    produce = make_producer(L)
    multiply, add = multiply_keys(KEYS, L.HALVES, L.QUERY_HALF, L.KEY_HALF), add_values(KEYS, L.HALVES, L.KEY_HALF)
    wait_scores, wait_scores_alone = multiply_wait(SCORES, 1), multiply_wait(SCORES, 0)
    # The sums are an argument so that the compiler does not move the exponentials behind the wait.
    wait_outputs = multiply_wait(OUTPUTS, 0, also=f"u32*{KEYS // 4} f32 f32")
    mask, maxima, powers = mask_scores(SCORES), row_maxima(SCORES), exponentials(SCORES)
    add_up, pack, rescale, zero = row_sums(SCORES), pack_pairs(SCORES), scale_rows(OUTPUTS), zeros(OUTPUTS)
    store = make_store(L)

    @device_function
    def keys_in(shared, stage):
        return descriptor(np.uint32(shared + L.KEYS_AT + stage * L.MATRIX))

    @device_function
    def values_in(shared, stage):
        return descriptor(np.uint32(shared + L.VALUES_AT + stage * L.MATRIX))

    @device_function
    def soften(scores, scale, m_0, m_1, l_0, l_1):
        """(weights, m, l, r) of the online softmax: for the rows g and g + 8 of a lane."""
        highest = maxima(scores)
        new_0, new_1 = highest[0], highest[1]
        for lanes in (1, 2):  # the four lanes of a row exchange their maxima
            new_0 = maximum(new_0, shuffle_xor(new_0, lanes))
            new_1 = maximum(new_1, shuffle_xor(new_1, lanes))
        new_0, new_1 = maximum(m_0, new_0 * scale), maximum(m_1, new_1 * scale)
        r_0, r_1 = exp2(m_0 - new_0), exp2(m_1 - new_1)
        scores = powers(scores, scale, new_0, new_1)
        sums = add_up(scores)  # per lane until the end
        return scores, new_0, new_1, l_0 * r_0 + sums[0], l_1 * r_1 + sums[1], r_0, r_1

    @device_function
    def clear_values(shared, stage, first, consumer, own):
        """Zeros in place of the values from row `first` on; by a whole warpgroup, of which this is thread `own`."""
        at = np.uint32(first * 128 + own * 16)
        while at < L.KEY_HALF:
            for i in range(L.HALVES):
                store_shared_16_bytes(np.uint32(shared + L.VALUES_AT + stage * L.MATRIX + i * L.KEY_HALF + at),
                                      0, 0, 0, 0)
            at = np.uint32(at + 128 * 16)
        shared_to_engine()  # ordinary writes, which wgmma is to see
        group_barrier(np.uint32(consumer + 1))

    @kernel(signature=SIGNATURE, max_threads=L.THREADS, min_blocks=MIN_BLOCKS)
    def prefill(q_map, k_map, v_map, out, block_tables, seq_lens, query_start_loc, num_decodes, num_requests,
                max_blocks, scale, num_heads, num_kv_heads):
        """Maps: of qkv [tokens, heads, D], boxes TOKENS x GROUP x 64; of the caches, rows of D, boxes BLOCK x 64.
        scale: of the scores, times log2(e), because exp2 is what the hardware has."""
        thread, lane = thread_index(), lane_index()
        shared = dynamic_shared()
        if thread == 0:
            for i in range(2):
                barrier_init(np.uint32(shared + L.Q_ARRIVED + 8 * i), np.uint32(1))
                barrier_init(np.uint32(shared + L.Q_FREED + 8 * i), np.uint32(4 * L.CONSUMERS))
            for i in range(L.STAGES):
                barrier_init(np.uint32(shared + L.K_ARRIVED + 8 * i), np.uint32(1))
                barrier_init(np.uint32(shared + L.K_FREED + 8 * i), np.uint32(4 * L.CONSUMERS))
                barrier_init(np.uint32(shared + L.V_ARRIVED + 8 * i), np.uint32(1))
                barrier_init(np.uint32(shared + L.V_FREED + 8 * i), np.uint32(4 * L.CONSUMERS))
            barriers_ready()
        cuda.syncthreads()
        if thread >= L.PRODUCER:
            produce(shared, q_map, k_map, v_map, block_tables, seq_lens, query_start_loc, num_decodes, num_requests,
                    max_blocks, num_kv_heads)
        else:
            consumer = np.uint32(0 if L.CONSUMERS == 1 else same_in_warp(thread // np.uint32(128)))
            own = np.uint32(thread % np.uint32(128))
            warp_row = np.uint32(np.uint32(thread // np.uint32(32)) * 16)
            row = np.uint32(warp_row + lane // np.uint32(4))  # this lane's are this one and the eighth after it
            token_0, token_1 = np.int32(row // np.uint32(L.GROUP)), np.int32(np.uint32(row + 8) // np.uint32(L.GROUP))
            group_token = np.int32(np.uint32(consumer * 64) // np.uint32(L.GROUP))  # the warpgroup's first
            column = np.int32(lane % np.uint32(4) * 2)  # this lane's first; mask_scores counts from it
            buffer, q_phase = np.uint32(0), np.uint32(0)
            k_stage, k_phase = np.uint32(0), np.uint32(0)
            v_stage, v_phase = np.uint32(0), np.uint32(0)  # a tile behind
            working = True
            while working:
                barrier_wait(np.uint32(shared + L.Q_ARRIVED + 8 * buffer), q_phase)
                entry = np.uint32(shared + L.ENTRIES_AT + 32 * buffer)
                first_row, num_tokens, first_position, kv_head = load_shared_16_bytes(entry)
                first_row, num_tokens = same_in_warp(first_row), same_in_warp(num_tokens)
                first_position, kv_head = same_in_warp(first_position), same_in_warp(kv_head)
                seq_len = np.int32(same_in_warp(load_shared_16_bytes(np.uint32(entry + 16))[0]))
                working = num_tokens > 0
                if working:
                    # idle rows repeat the last token
                    tokens, position = np.int32(num_tokens), np.int32(first_position)
                    last_0 = np.int32(position + min(token_0, tokens - 1) - column)
                    last_1 = np.int32(position + min(token_1, tokens - 1) - column)
                    lowest = np.int32(position + min(group_token, tokens - 1))  # position in this warpgroup
                    first_masked = np.int32(np.uint32(lowest + 1) // np.uint32(L.KEYS))  # tile
                    tile = np.int32(np.uint32(first_position + num_tokens + (L.KEYS - 1)) // np.uint32(L.KEYS) - 1)
                    queries = np.uint32(shared + buffer * L.QUERIES)
                    q = descriptor(np.uint32(queries + consumer * (64 * 128)))

                    # ---- the last tile of keys ----
                    barrier_wait(np.uint32(shared + L.K_ARRIVED + 8 * k_stage), k_phase)
                    scores = wait_scores_alone(multiply(q, keys_in(shared, k_stage)))
                    barrier_arrive_where_0(np.uint32(shared + L.K_FREED + 8 * k_stage), lane)
                    v_stage, v_phase = k_stage, k_phase
                    k_stage, k_phase = next_stage(k_stage, k_phase, L.STAGES)
                    scores = mask(scores, np.int32(last_0 - tile * L.KEYS), np.int32(last_1 - tile * L.KEYS))
                    scores, m_0, m_1, l_0, l_1, r_0, r_1 = soften(scores, scale, LOWEST, LOWEST, ZERO, ZERO)
                    weights = pack(scores)
                    outputs = zero()
                    if (tile + 1) * L.KEYS > seq_len:
                        barrier_wait(np.uint32(shared + L.V_ARRIVED + 8 * v_stage), v_phase)
                        clear_values(shared, v_stage, np.uint32(seq_len - tile * L.KEYS), consumer, own)

                    # ---- the others: two products under way, and the softmax beside the second ----
                    while tile > 0:
                        tile = np.int32(tile - 1)
                        barrier_wait(np.uint32(shared + L.K_ARRIVED + 8 * k_stage), k_phase)
                        barrier_wait(np.uint32(shared + L.V_ARRIVED + 8 * v_stage), v_phase)
                        queries_here, keys_here = same_in_warp(q), same_in_warp(keys_in(shared, k_stage))
                        values_here = same_in_warp(values_in(shared, v_stage))
                        scores = multiply(queries_here, keys_here)
                        outputs = add(outputs, weights, values_here)
                        scores = wait_scores(scores)
                        barrier_arrive_where_0(np.uint32(shared + L.K_FREED + 8 * k_stage), lane)
                        held_stage, held_phase = k_stage, k_phase
                        k_stage, k_phase = next_stage(k_stage, k_phase, L.STAGES)
                        if tile >= first_masked:
                            scores = mask(scores, np.int32(last_0 - tile * L.KEYS), np.int32(last_1 - tile * L.KEYS))
                        scores, m_0, m_1, l_0, l_1, r_0, r_1 = soften(scores, scale, m_0, m_1, l_0, l_1)
                        outputs = wait_outputs(outputs, weights, l_0, l_1)
                        barrier_arrive_where_0(np.uint32(shared + L.V_FREED + 8 * v_stage), lane)
                        v_stage, v_phase = held_stage, held_phase
                        outputs = rescale(outputs, r_0, r_1)
                        weights = pack(scores)
                    barrier_wait(np.uint32(shared + L.V_ARRIVED + 8 * v_stage), v_phase)
                    outputs = add(outputs, weights, values_in(shared, v_stage))
                    for lanes in (1, 2):
                        l_0, l_1 = l_0 + shuffle_xor(l_0, lanes), l_1 + shuffle_xor(l_1, lanes)
                    outputs = wait_outputs(outputs, weights, l_0, l_1)
                    barrier_arrive_where_0(np.uint32(shared + L.V_FREED + 8 * v_stage), lane)

                    outputs = rescale(outputs, reciprocal(l_0), reciprocal(l_1))
                    store(out, queries, outputs, consumer, warp_row, lane, first_row, num_tokens, kv_head, num_heads)
                    barrier_arrive_where_0(np.uint32(shared + L.Q_FREED + 8 * buffer), lane)
                    buffer, q_phase = next_buffer(buffer, q_phase)

    prefill.threads, prefill.shared_bytes, prefill.shared_percent = L.THREADS, L.SHARED, 100
    prefill.tokens, prefill.blocks = L.TOKENS, MIN_BLOCKS
    return prefill
