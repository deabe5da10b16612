"""The warp of prefill_wgmma.py that keeps work coming: finds the next tile of queries, and asks for all it needs.

Which tile is next is found while the consumers have the most of this one to work on. For each tile of queries it writes
an entry, which the barrier of the queries makes visible with them:

    first row in qkv, tokens (0: that was all), position of the first, key head | tokens in the request's context

Then the request's pages, from the last that the tile sees to the first. Each lane has one page of a tile (or half a
page, if head_dim is 128): it looks the page up in the block table one tile ahead, waits with the others until the
stage is free, and asks the copy engine for its box. Columns of the block table past the sequence's end are not read,
and where a block table is wrong the copy engine delivers zeros: it reads nothing outside of the cache.
"""

import numpy as np

from tinyvllm.kernels.attention.prefill_layout import Layout
from tinyvllm.kernels.attention.schedule import count_tiles, find_tile, item_of_turn, most_keys, shape_of
from tinyvllm.kernels.cuda_support import device_function
from tinyvllm.kernels.hopper import (
    barrier_arrive,
    barrier_expect,
    barrier_wait,
    tensor_load,
    tensor_load_3d,
    tensor_map_acquire,
)
from tinyvllm.kernels.ptx import (
    block_index_x,
    grid_size_x,
    lane_index,
    load_i32,
    store_shared_16_bytes,
    warp_barrier,
)

__all__ = ["make_producer", "next_stage", "next_buffer"]


@device_function
def next_stage(stage, phase, STAGES):
    """(stage, parity of its phase) of a ring, after these."""
    stage = np.uint32(stage + 1)
    if stage == STAGES:
        stage, phase = np.uint32(0), np.uint32(phase ^ np.uint32(1))
    return stage, phase


@device_function
def next_buffer(buffer, phase):
    """The same for the two buffers of queries."""
    return np.uint32(buffer ^ np.uint32(1)), np.uint32(phase ^ buffer)


@device_function
def wait_together(barrier, parity):
    """barrier_wait for a warp. A barrier knows only the parity of its phase: a lane that nobody waits for could look
    at it so late that the barrier has completed once more, and would then wait for a phase that never comes."""
    barrier_wait(barrier, parity)
    warp_barrier()


def make_producer(L: Layout):
    """produce(shared, ...the kernel's arguments...), for one warp."""

    @device_function
    def produce(shared, q_map, k_map, v_map, block_tables, seq_lens, query_start_loc, num_decodes, num_requests,
                max_blocks, num_kv_heads):
        lane = lane_index()
        tensor_map_acquire(q_map)
        tensor_map_acquire(k_map)
        tensor_map_acquire(v_map)
        lens = seq_lens + np.uint64(num_decodes) * np.uint64(4)
        starts = query_start_loc + np.uint64(num_decodes) * np.uint64(4)
        requests, kv_heads = np.uint32(num_requests - num_decodes), np.uint32(num_kv_heads)
        own = shape_of(starts, lens, requests, lane)
        num_items = np.uint32(count_tiles(0, own, starts, lens, requests, lane, L.TOKENS) * kv_heads)
        keys = np.int32(most_keys(lens, requests, lane))
        page, half = np.uint32(lane % np.uint32(L.PAGES)), np.uint32(lane // np.uint32(L.PAGES))  # this lane's
        place = np.uint32(half * L.KEY_HALF + page * L.BOX)
        buffer, q_phase = np.uint32(0), np.uint32(0)
        stage, phase = np.uint32(0), np.uint32(0)
        turn = np.uint32(0)
        item = item_of_turn(turn, block_index_x(), grid_size_x())
        request = np.uint32(0)
        if item < num_items:
            request, keys = find_tile(np.uint32(item // kv_heads), keys, own, starts, lens, requests, lane, L.TOKENS)
        while item < num_items:
            kv_head = np.uint32(item % kv_heads)
            turn = np.uint32(turn + 1)
            item = item_of_turn(turn, block_index_x(), grid_size_x())
            here = starts + np.uint64(request) * np.uint64(4)
            request_row = load_i32(here)
            rows = load_i32(here + np.uint64(4)) - request_row
            seq_len = load_i32(lens + np.uint64(request) * np.uint64(4))
            first_token = np.int32(np.uint32(keys - (seq_len - rows) - 1) // np.uint32(L.TOKENS) * L.TOKENS)
            first_row, position = np.uint32(request_row + first_token), np.int32(seq_len - rows + first_token)
            pages = np.int32(np.uint32(seq_len + L.BLOCK - 1) // np.uint32(L.BLOCK))
            table = block_tables + np.uint64(request + num_decodes) * np.uint64(max_blocks) * np.uint64(4)
            tile = np.int32(np.uint32(keys + L.KEYS - 1) // np.uint32(L.KEYS) - 1)
            search_at = np.int32(max(0, tile + 1 - L.STAGES) if item < num_items else -1)
            block = np.int32(0)
            if tile * L.PAGES + page < pages:
                block = load_i32(table + np.uint64(tile * L.PAGES + page) * np.uint64(4))

            wait_together(np.uint32(shared + L.Q_FREED + 8 * buffer), np.uint32(q_phase ^ np.uint32(1)))
            if lane == 0:
                entry = np.uint32(shared + L.ENTRIES_AT + 32 * buffer)
                store_shared_16_bytes(entry, first_row, np.uint32(keys - position), np.uint32(position), kv_head)
                store_shared_16_bytes(np.uint32(entry + 16), np.uint32(seq_len), 0, 0, 0)
                barrier = np.uint32(shared + L.Q_ARRIVED + 8 * buffer)
                barrier_expect(barrier, np.uint32(L.HALVES * L.TOKENS * L.GROUP * 128))
                for i in range(L.HALVES):
                    tensor_load_3d(np.uint32(shared + buffer * L.QUERIES + i * L.QUERY_HALF), q_map, np.uint32(64 * i),
                                   np.uint32(kv_head * L.GROUP), first_row, barrier)
            while tile >= 0:
                row = np.uint32((block * kv_heads + kv_head) * L.BLOCK)  # of the cache as rows of D
                pages_here = np.uint32(min(L.PAGES, pages - tile * L.PAGES))
                mine = half < L.HALVES and page < pages_here
                if tile > 0:
                    block = load_i32(table + np.uint64((tile - 1) * L.PAGES + page) * np.uint64(4))
                num_bytes = np.uint32(pages_here * (L.HALVES * L.BOX))
                to = np.uint32(shared + L.KEYS_AT + stage * L.MATRIX + place)
                barrier = np.uint32(shared + L.K_ARRIVED + 8 * stage)
                wait_together(np.uint32(shared + L.K_FREED + 8 * stage), np.uint32(phase ^ np.uint32(1)))
                if lane == 0:
                    barrier_expect(barrier, num_bytes)
                if mine:
                    tensor_load(to, k_map, np.uint32(64 * half), row, barrier)
                barrier = np.uint32(shared + L.V_ARRIVED + 8 * stage)
                wait_together(np.uint32(shared + L.V_FREED + 8 * stage), np.uint32(phase ^ np.uint32(1)))
                if lane == 0:
                    barrier_expect(barrier, num_bytes)
                if mine:
                    tensor_load(np.uint32(to + (L.VALUES_AT - L.KEYS_AT)), v_map, np.uint32(64 * half), row, barrier)
                stage, phase = next_stage(stage, phase, L.STAGES)
                if tile == search_at:  # now the consumers have most to work on
                    request, keys = find_tile(np.uint32(item // kv_heads), keys, own, starts, lens, requests, lane,
                                              L.TOKENS)
                tile = np.int32(tile - 1)
            buffer, q_phase = next_buffer(buffer, q_phase)

        wait_together(np.uint32(shared + L.Q_FREED + 8 * buffer), np.uint32(q_phase ^ np.uint32(1)))
        if lane == 0:  # an entry without tokens
            store_shared_16_bytes(np.uint32(shared + L.ENTRIES_AT + 32 * buffer), 0, 0, 0, 0)
            barrier_arrive(np.uint32(shared + L.Q_ARRIVED + 8 * buffer))

    return produce
