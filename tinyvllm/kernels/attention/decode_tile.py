"""What decode_registers.py does with the scores of 16 keys, and with the results of a block's warps.

The query heads that share a key head are few (1 to 8, seldom more), and mma's smallest side is 8: they are its columns,
and the keys its 16 rows. With g = lane // 4 and q = lane % 4 a lane holds

    scores    S  = K Q^T      (16 keys x 8 heads)        keys g and g + 8, heads 2q and 2q + 1
    weights   P               (16 keys x 8 heads)        keys 2q, 2q + 1, 2q + 8, 2q + 9 of head g: transposed
    outputs   O += V^T P      (head_dim x 8 heads)       heads 2q and 2q + 1 again

so that sums are scaled where the maxima are. From 9 to 16 heads there are two such tiles of heads.

A warp's m, l and O go to shared memory; there they are added over the warps, in ascending order, and a part of a
split context goes to memory for combine.py.
"""

import numpy as np

from tinyvllm.kernels.attention.decode_simple import STATISTICS
from tinyvllm.kernels.attention.prefill import LOG2_E
from tinyvllm.kernels.cuda_support import cuda, device_function
from tinyvllm.kernels.ptx import (
    exp2,
    instruction,
    lane_index,
    load_shared_f32,
    maximum,
    pack_bf16,
    quotient,
    shuffle_xor,
    store_f32,
    store_shared_two_f32,
    store_u32,
    thread_index,
)

__all__ = ["make_weights", "make_leave", "make_finish", "head_tiles", "head_pitch"]

# An 8 x 8 bf16 matrix of which a lane has row g, columns 2q and 2q + 1: transposed.
transpose = instruction("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "u32", "u32", volatile=True)
store_two_f32 = instruction("st.global.v2.f32 [$0], {$1,$2};", "", "u64 f32 f32", memory=True)
load_shared_two_f32 = instruction("ld.shared.v2.f32 {$0,$1}, [$2];", "f32 f32", "u32", memory=True)


def head_tiles(group: int) -> int:
    """Tiles of 8 heads in a block: for up to 16 of the `group` query heads of a key head."""
    return 1 if group <= 8 else 2


def make_weights(TILES: int):
    """soften(scores, m, l, r, weights, left, scale): one step of the online softmax, for TILES tiles of heads.

    scores float32 [TILES, 4], as above; `left` keys are left, others have weight 0. m, l, r: float32 [TILES, 2], of a
    lane's two heads: maxima, this lane's share of the sums, and by how much earlier sums shrink. weights: uint32
    [TILES, 2], gets the packed weights.
    """

    @device_function
    def soften(scores, m, l, r, weights, left, scale):  # noqa: E741
        key = np.int32(lane_index() // np.uint32(4))
        for h in range(TILES):
            for c in range(2):
                scores[h, c] = scores[h, c] * scale if key < left else np.float32(-np.inf)
                scores[h, c + 2] = scores[h, c + 2] * scale if key + 8 < left else np.float32(-np.inf)
                r[h, c] = maximum(m[h, c], maximum(scores[h, c], scores[h, c + 2]))
        for i in range(3):  # (over a tuple it would stay a loop, with a branch for each of its elements)
            for h in range(TILES):
                for c in range(2):
                    r[h, c] = maximum(r[h, c], shuffle_xor(r[h, c], np.uint32(4 << i)))
        for h in range(TILES):
            for c in range(2):
                largest = r[h, c]
                r[h, c] = exp2(m[h, c] - largest)
                m[h, c] = largest
                scores[h, c] = exp2(scores[h, c] - largest)
                scores[h, c + 2] = exp2(scores[h, c + 2] - largest)
                l[h, c] = l[h, c] * r[h, c] + (scores[h, c] + scores[h, c + 2])
            weights[h, 0] = transpose(pack_bf16(scores[h, 0], scores[h, 1]))
            weights[h, 1] = transpose(pack_bf16(scores[h, 2], scores[h, 3]))

    return soften


def make_leave(D: int, TILES: int):
    """leave(at, outputs, m, l, heads): a warp's results into shared memory, [head][D, then m and l].

    outputs: float32 [TILES, D / 16, 4]; a lane's features are 8 g and the 7 after it (of each 64). at: address;
    heads: how many there are.
    """
    PITCH = head_pitch(D)

    @device_function
    def leave(at, outputs, m, l, heads):  # noqa: E741
        lane = lane_index()
        g, q = np.uint32(lane // np.uint32(4)), np.uint32(lane % np.uint32(4))
        for i in range(3):
            for h in range(TILES):
                for c in range(2):
                    l[h, c] = l[h, c] + shuffle_xor(l[h, c], np.uint32(4 << i))
        for h in range(TILES):
            for c in range(2):
                head = np.uint32(h * 8 + 2 * q + c)
                if head < heads:
                    row = np.uint32(at + head * (4 * PITCH))
                    for t in range(D // 16):
                        store_shared_two_f32(np.uint32(row + 32 * g + (t // 4 * 256 + t % 4 * 8)),
                                             outputs[h, t, c], outputs[h, t, c + 2])
                    if g == 0:
                        store_shared_two_f32(np.uint32(row + 4 * D), m[h, c], l[h, c])

    return leave


def head_pitch(D: int) -> int:
    """Floats from a head to the next in shared memory: m and l are between."""
    return D + STATISTICS


def make_finish(D: int, WARPS: int, WARP_BYTES: int):
    """finish(...): when all warps have left their results, WARP_BYTES apart: the output, or a part of it."""
    PITCH = head_pitch(D)
    PART = (D + STATISTICS) * 4
    LN_2 = 1 / LOG2_E

    @device_function
    def finish(shared, out, parts, first_row, heads, split, num_splits, seq_len, part_keys):
        """first_row: of the first head, in out as rows of D."""
        cuda.syncthreads()
        index = np.uint32(thread_index())
        while index < heads * (D // 2):
            head = np.uint32(index // np.uint32(D // 2))
            column = np.uint32(index % np.uint32(D // 2) * 2)
            at = np.uint32(shared + head * (4 * PITCH))
            m = np.float32(-np.inf)
            for w in range(WARPS):
                m = maximum(m, load_shared_f32(np.uint32(at + (w * WARP_BYTES + 4 * D))))
            denominator, total_0, total_1 = np.float32(0), np.float32(0), np.float32(0)
            for w in range(WARPS):
                weight, share = load_shared_two_f32(np.uint32(at + (w * WARP_BYTES + 4 * D)))
                weight = exp2(weight - m)  # a warp without keys has m = -inf, weight 0
                a, b = load_shared_two_f32(np.uint32(at + w * WARP_BYTES + 4 * column))
                denominator = denominator + weight * share
                total_0, total_1 = total_0 + weight * a, total_1 + weight * b
            row = np.uint64(first_row + head)
            if seq_len <= part_keys:  # the only part: finished
                store_u32(out + row * np.uint64(2 * D) + np.uint64(2 * column),
                          pack_bf16(quotient(total_0, denominator), quotient(total_1, denominator)))
            else:
                part = parts + (row * np.uint64(num_splits) + np.uint64(split)) * np.uint64(PART)
                store_two_f32(part + np.uint64(4 * column), total_0, total_1)
                if column == 0:
                    # the combine counts in powers of e
                    store_f32(part + np.uint64(4 * D), m * np.float32(LN_2))
                    store_f32(part + np.uint64(4 * D + 4), denominator)
            index = np.uint32(index + 32 * WARPS)

    return finish
