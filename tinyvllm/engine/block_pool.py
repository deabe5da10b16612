"""The physical KV-cache blocks: who holds them, which are free, and which free ones still hold useful keys.

    held (ref_cnt > 0)     belongs to one or more requests
    free, cached           nobody holds it, but its contents are known by hash: the next equal prefix may take it
    free, empty            nothing of value

All free blocks stand in one queue, least recently used first. A new block is taken from its head; if that one was
cached, its hash is forgotten (eviction). A hit takes a block out of the middle of the queue.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from tinyvllm.engine.events import EventLog

BlockHash = bytes
NO_PARENT: BlockHash = b""


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a full block: its tokens and, through its parent's hash, everything before it.

    Keys and values depend on the whole prefix, so equal tokens after another parent are another block.
    """
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(np.asarray(token_ids, np.int64).tobytes())
    return digest.digest()


class KVCacheBlock:
    """One physical block. block_hash is set while the block is full and findable."""

    __slots__ = ("block_id", "ref_cnt", "block_hash", "parent_hash", "token_ids")

    def __init__(self, block_id: int):
        self.block_id = block_id
        self.ref_cnt = 0
        self.block_hash: BlockHash | None = None
        self.parent_hash: BlockHash = NO_PARENT
        self.token_ids: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}, cached={self.block_hash is not None})"


class BlockPool:
    """num_blocks blocks of block_size tokens each. hash_fn can be replaced in tests, to force collisions."""

    def __init__(self, num_blocks: int, block_size: int,
                 hash_fn: Callable[[BlockHash, Sequence[int]], BlockHash] = hash_block):
        self.events: EventLog | None = None  # set by LLMEngine.listen
        self.block_size = block_size
        self.hash_fn = hash_fn
        self.blocks = [KVCacheBlock(i) for i in range(num_blocks)]
        self.free_block_queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.cached_blocks: dict[BlockHash, KVCacheBlock] = {}

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_block_queue)

    @property
    def usage(self) -> float:
        """Share of blocks that some request holds, 0 to 1."""
        return 1 - self.num_free_blocks / self.num_blocks

    def get_new_blocks(self, count: int) -> list[KVCacheBlock]:
        """Take `count` blocks from the head of the free queue; the caller has checked that there are as many."""
        queue, blocks = self.free_block_queue, self.blocks
        if count > len(queue):
            raise RuntimeError(f"{count} blocks asked for, {len(queue)} free")
        taken = []
        evicted = []
        for _ in range(count):
            block_id, _ = queue.popitem(last=False)
            block = blocks[block_id]
            if block.block_hash is not None:
                self._evict(block)
                evicted.append(block_id)
            block.ref_cnt = 1
            taken.append(block)
        if evicted and self.events is not None:
            self.events.emit("blocks_evicted", None, evicted)
        return taken

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """One more request holds these cached blocks (a prefix hit)."""
        for block in blocks:
            if block.ref_cnt == 0:
                del self.free_block_queue[block.block_id]
            block.ref_cnt += 1

    def free_blocks(self, blocks: Sequence[KVCacheBlock]) -> None:
        """A request lets go of its blocks, given in sequence order.

        They join the free queue tail first: the end of a sequence is evicted before its beginning, because a
        prefix is worth more than what follows it (without its parents a block cannot be found at all).
        """
        for block in reversed(blocks):
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self.free_block_queue[block.block_id] = None
            elif block.ref_cnt < 0:
                raise RuntimeError(f"block {block.block_id} was freed twice")

    def find(self, parent_hash: BlockHash, token_ids: Sequence[int]) -> KVCacheBlock | None:
        """The cached block with these tokens after this parent. Tokens are compared too: a hash alone can collide."""
        block = self.cached_blocks.get(self.hash_fn(parent_hash, token_ids))
        if block is not None and block.parent_hash == parent_hash and block.token_ids == tuple(token_ids):
            return block
        return None

    def cache_full_block(self, block: KVCacheBlock, parent_hash: BlockHash,
                         token_ids: Sequence[int]) -> BlockHash | None:
        """Make a full, computed block findable; returns its hash.

        If an equal block is findable already (two equal prompts ran side by side), this one stays anonymous. None: the
        hash belongs to another block (a collision). Then nothing after this block may be published either, because it
        would be found by those who come from the other one.
        """
        block_hash = self.hash_fn(parent_hash, token_ids)
        known = self.cached_blocks.get(block_hash)
        if known is None:
            block.block_hash, block.parent_hash, block.token_ids = block_hash, parent_hash, tuple(token_ids)
            self.cached_blocks[block_hash] = block
        elif (known.parent_hash, known.token_ids) != (parent_hash, tuple(token_ids)):
            return None
        return block_hash

    def reset_cache(self) -> None:
        """Forget every hash: nothing is found until it is computed anew."""
        forgotten = list(self.cached_blocks.values())
        for block in forgotten:
            self._evict(block)
        if forgotten and self.events is not None:
            self.events.emit("blocks_evicted", None, [block.block_id for block in forgotten])

    def _evict(self, block: KVCacheBlock) -> None:
        del self.cached_blocks[block.block_hash]
        block.block_hash, block.parent_hash, block.token_ids = None, NO_PARENT, ()

    def check(self) -> None:
        """Raise AssertionError if the books do not balance: used by tests, and cheap enough to call when idle."""
        for block in self.blocks:
            free = block.block_id in self.free_block_queue
            assert free == (block.ref_cnt == 0), f"{block!r} is {'in' if free else 'not in'} the free queue"
            assert block.ref_cnt >= 0, repr(block)
            if block.block_hash is not None:
                assert self.cached_blocks.get(block.block_hash) is block, f"{block!r} is lost to look-ups"
        for block_hash, block in self.cached_blocks.items():
            assert block.block_hash == block_hash, f"{block!r} stands under a stale hash"
