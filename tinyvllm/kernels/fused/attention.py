"""Which attention kernels the fused operations launch, and how: `fused` is a FusedOperations.

                    compute capability 9.0                            8.0 and newer
    decode_rows     decode_registers.py, and combine.py for parts     decode.py and combine.py
    prompt_rows     prefill_wgmma.py from some rows on                prefill.py

Arguments are those of the operation (numpy_twin.py), but for scale, which is times log2(e).
"""

from tinyvllm.kernels.attention import decode, decode_registers, prefill, prefill_wgmma
from tinyvllm.kernels.attention.combine import WARPS as COMBINE_WARPS
from tinyvllm.kernels.attention.combine import combine_parts_kernel
from tinyvllm.kernels.attention.decode_simple import STATISTICS
from tinyvllm.kernels.attention.prefill_simple import num_tiles as prefill_tiles
from tinyvllm.kernels.cuda_support import ceil_div

__all__ = ["decode_rows", "prompt_rows"]

DECODE_STAGES = 2  # of decode.py; with 3 or 4 fewer blocks fit on a multiprocessor, for the same bandwidth
WGMMA_PREFILL_ROWS = 128  # a prompt of 32 tokens is there after 1.83 ms without wgmma in its attention, 2.05 with it


def decode_rows(fused, out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
                num_heads, num_kv_heads, head_dim, block_size) -> None:
    """Of the requests with one row each, which come first; splits their contexts where choose_shape says so."""
    max_blocks, group = block_tables.shape[1], num_heads // num_kv_heads
    percent = fused._shared_percent(out.shape[0])
    head_blocks = num_kv_heads * ceil_div(group, 16)
    straight = fused.hopper and decode_registers.can_run(head_dim, group, block_size)
    order, num_contexts = fused.hints.order, num_decodes * head_blocks
    if straight:
        warps, part_keys = decode_registers.INVARIANT_SHAPE if fused.batch_invariant else (
            decode_registers.choose_shape(num_contexts, max_blocks * block_size, fused.num_multiprocessors,
                                          decode_registers.warps_at_once(head_dim, group), fused.hints.in_parts))
        if num_contexts <= fused.num_multiprocessors:  # all begin at once
            order = None
        percent = percent or decode_registers.SHARED_PERCENT
        kernel = decode_registers.decode_registers_kernel(head_dim, group, block_size, warps, percent)
    else:
        part_keys = decode.SPLIT
        kernel = decode.decode_kernel(head_dim, fused.dependent, DECODE_STAGES, block_size, percent)
    splits = ceil_div(max_blocks * block_size, part_keys)
    parts = fused._workspace(num_decodes * num_heads * splits * (head_dim + STATISTICS)) if splits > 1 else 0
    addresses = (out.address, parts, qkv.address, k_cache.address, v_cache.address, block_tables.address,
                 seq_lens.address)
    if straight:
        fused._run(kernel, (head_blocks, splits, num_decodes), kernel.threads, kernel.shared_bytes, *addresses,
                   0 if order is None else order.address, max_blocks, part_keys, splits, scale, num_heads,
                   num_kv_heads)
    else:
        fused._run(kernel, (splits, head_blocks, num_decodes), kernel.threads, kernel.shared_bytes, *addresses,
                   max_blocks, splits, scale, num_heads, num_kv_heads, block_size)
    if splits > 1:
        num_rows = num_decodes * num_heads
        fused._run(combine_parts_kernel(head_dim, fused.dependent, percent),
                   (ceil_div(num_rows, COMBINE_WARPS), 1, 1), 32 * COMBINE_WARPS, 0, out.address, parts,
                   seq_lens.address, part_keys, splits, num_heads, num_rows)


def prompt_rows(fused, out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
                num_heads, num_kv_heads, head_dim, block_size) -> None:
    """Of the requests after the first num_decodes."""
    arguments = (out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc)
    if _by_wgmma(fused, *arguments, num_decodes, scale, num_heads, num_kv_heads, head_dim, block_size):
        return
    num_requests, max_blocks = block_tables.shape
    tiles = prefill_tiles(out.shape[0], num_decodes, num_requests, prefill.ROWS // (num_heads // num_kv_heads))
    kernel = prefill.prefill_kernel(head_dim)
    fused._run(kernel, (tiles, num_kv_heads, 1), prefill.THREADS, kernel.shared_bytes,
               *(argument.address for argument in arguments), num_decodes, num_requests, max_blocks, scale, num_heads,
               num_kv_heads, block_size, dependent=False)


def _by_wgmma(fused, out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
              num_heads, num_kv_heads, head_dim, block_size) -> bool:
    """False where it cannot."""
    rows = out.shape[0] - num_decodes
    if not (fused.hopper and (fused.batch_invariant or rows >= fused.wgmma_prefill_rows)
            and prefill_wgmma.can_run(num_heads, num_kv_heads, head_dim, block_size)):
        return False
    num_requests, max_blocks = block_tables.shape
    group, shape = num_heads // num_kv_heads, prefill_wgmma.choose_shape(head_dim, block_size)
    kernel = prefill_wgmma.prefill_wgmma_kernel(head_dim, group, block_size, *shape)
    tiles = prefill_tiles(out.shape[0], num_decodes, num_requests, kernel.tokens) * num_kv_heads
    heads = qkv.reshape(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    caches = (cache.reshape(cache.size // head_dim, head_dim) for cache in (k_cache, v_cache))
    fused._run(kernel, (min(tiles, kernel.blocks * fused.num_multiprocessors), 1, 1), kernel.threads,
               kernel.shared_bytes, fused.maps.of(heads, kernel.tokens, group),
               *(fused.maps.of(cache, block_size) for cache in caches), out.address, block_tables.address,
               seq_lens.address, query_start_loc.address, num_decodes, num_requests, max_blocks, scale, num_heads,
               num_kv_heads, dependent=False)
    return True
