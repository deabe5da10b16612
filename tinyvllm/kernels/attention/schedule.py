"""Which tile of which request is whose: the order in which prefill_wgmma.py goes through its work, longest first.

A tile is up to TOKENS neighbouring tokens of a request with the query heads of one key head. How long it takes is
how many keys its last token sees. Blocks stay and take tile after tile, so the long ones should come first: what is
left at the end, when blocks become idle one after the other, is then small. And the blocks take turns in both
directions, or the first would always get the longest:

    turn 0      block 0  1  2  3         0 1 2 3
    turn 1            3  2  1  0         7 6 5 4     numbers of tiles, in descending order of keys
    turn 2            0  1  2  3         8 9 10 11

Nothing is sorted for that. The lengths are on the device, and a warp finds the tile with a given number by itself: how
many tiles have more than x keys is a sum of one division a request (tiles_with_more), and the tile with number n has
the smallest x for which that is at most n. Bisection over x takes a dozen sums, for which there is time while the
warpgroups that compute have the tile before to work on (prefill_producer.py). Tiles of as many keys come in the order
of their requests.

    request A  context 0, 100 rows    tiles see 64, 100 keys         (TOKENS = 64)
    request B  context 90, 20 rows    tile sees 110                  order: B0 (110), A1 (100), A0 (64)
"""

import numpy as np

from tinyvllm.kernels.cuda_support import device_function
from tinyvllm.kernels.ptx import ballot, count_bits, load_i32, warp_max, warp_sum

__all__ = ["item_of_turn", "tiles_with_more", "shape_of", "count_tiles", "most_keys", "find_tile"]


@device_function
def item_of_turn(turn, block, num_blocks):
    """Number of the piece of work that a block has in a turn; see above."""
    if turn % 2 == 0:
        return np.uint32(turn * num_blocks + block)
    return np.uint32((turn + 1) * num_blocks - 1 - block)


@device_function
def tiles_with_more(keys, context, rows, TOKENS):
    """How many tiles of a request see more than `keys` keys (at least 0); context: tokens before its first row."""
    tiles = 0
    if context + rows > keys:
        # of the tiles that begin no later than `keys`, all but the last have all their keys up to there
        tiles = np.int32(np.uint32(rows + TOKENS - 1) // np.uint32(TOKENS)
                         - np.uint32(max(keys - context, 0)) // np.uint32(TOKENS))
    return tiles


@device_function
def shape_of(starts, lens, requests, request):
    """(tokens before the first row, rows) of a request, (0, 0) beyond the last. starts, lens: addresses of
    query_start_loc and seq_lens."""
    context, rows = np.int32(0), np.int32(0)
    if request < requests:
        place = np.uint64(request) * np.uint64(4)
        rows = np.int32(load_i32(starts + place + np.uint64(4)) - load_i32(starts + place))
        context = np.int32(load_i32(lens + place) - rows)
    return context, rows


@device_function
def count_tiles(keys, own, starts, lens, requests, lane, TOKENS):
    """Tiles of all requests that see more than `keys` keys; each lane of the warp looks at every 32nd request.

    own: shape_of the lane's first request, which it keeps, because this is asked a dozen times for every tile.
    """
    count = np.uint32(tiles_with_more(keys, own[0], own[1], TOKENS))
    request = np.uint32(lane + 32)
    while request < requests:
        context, rows = shape_of(starts, lens, requests, request)
        count = np.uint32(count + np.uint32(tiles_with_more(keys, context, rows, TOKENS)))
        request = np.uint32(request + 32)
    return warp_sum(count)


@device_function
def most_keys(lens, requests, lane):
    """The longest request's."""
    most, request = np.uint32(0), lane
    while request < requests:
        most = max(most, np.uint32(load_i32(lens + np.uint64(request) * np.uint64(4))))
        request = np.uint32(request + 32)
    return warp_max(most)


@device_function
def find_tile(number, most, own, starts, lens, requests, lane, TOKENS):
    """(request, keys) of the tile with a number in descending order of keys; there must be one. most: at least its
    keys. own: see count_tiles."""
    low, high = np.int32(0), np.int32(most)
    while low < high:
        middle = np.int32((low + high) >> 1)
        if count_tiles(middle, own, starts, lens, requests, lane, TOKENS) <= number:
            high = middle
        else:
            low = np.int32(middle + 1)
    before = np.uint32(number - count_tiles(low, own, starts, lens, requests, lane, TOKENS))
    # The request is the one that `before` others with such a tile come before.
    first, request = np.uint32(0), np.uint32(0)
    context, rows = own
    searching = True
    while searching:
        has = np.uint32(tiles_with_more(low - 1, context, rows, TOKENS) - tiles_with_more(low, context, rows, TOKENS))
        those = ballot(has)
        if before < count_bits(those):
            below = count_bits(np.uint32(those & np.uint32((np.uint64(1) << np.uint64(lane)) - np.uint64(1))))
            request = np.uint32(first + warp_sum(lane if has != 0 and below == before else np.uint32(0)))
            searching = False
        else:
            before = np.uint32(before - count_bits(those))
            first = np.uint32(first + 32)
            context, rows = shape_of(starts, lens, requests, np.uint32(first + lane))
            searching = first < requests  # always, if there is such a tile
    return request, low
