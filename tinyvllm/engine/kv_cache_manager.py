"""Blocks of each request: find a cached prefix, make room for new tokens, publish full blocks, let go.

    block table of a request      [ 7 | 2 | 9 ]        logical block i -> physical block
    its tokens                     ----|----|--..      the last block is partly filled

A contiguous cache is not another implementation: it is block_size = max_model_len, one block a sequence.
"""

from tinyvllm.engine.block_pool import NO_PARENT, BlockHash, BlockPool, KVCacheBlock
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.request import Request


class KVCacheManager:
    """Allocates from a BlockPool on behalf of requests."""

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool = True):
        self.pool = BlockPool(num_blocks, block_size)
        self.events: EventLog | None = None  # set by LLMEngine.listen
        self.block_size = block_size
        self.enable_caching = enable_caching
        self.req_to_blocks: dict[str, list[KVCacheBlock]] = {}
        self.req_to_block_ids: dict[str, list[int]] = {}  # the same as numbers, which is what a step needs
        self.req_to_hashes: dict[str, list[BlockHash]] = {}  # of the full blocks published or found so far
        self._unpublished: set[str] = set()  # requests whose blocks nobody else may find (see forget_cached)
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    def get_computed_blocks(self, request: Request) -> list[KVCacheBlock]:
        """The longest cached prefix of a waiting request, as full blocks.

        At least one token is left to compute, since its logits are needed: a prompt that is cached whole gives
        up its last block.
        """
        if not self.enable_caching:
            return []
        found: list[KVCacheBlock] = []
        parent = NO_PARENT
        for start in range(0, (request.num_tokens - 1) // self.block_size * self.block_size, self.block_size):
            block = self.pool.find(parent, request.token_ids[start:start + self.block_size])
            if block is None:
                break
            found.append(block)
            parent = block.block_hash
        return found

    def allocate_slots(self, request: Request, num_new_tokens: int,
                       computed_blocks: list[KVCacheBlock] | None = None) -> list[KVCacheBlock] | None:
        """Room for num_new_tokens after what is computed; returns the new blocks, or None (nothing changed).

        computed_blocks: a prefix from get_computed_blocks, for a request that is being admitted.
        """
        computed_blocks = computed_blocks or []
        blocks = self.req_to_blocks.get(request.request_id, [])
        num_tokens = request.num_computed_tokens + len(computed_blocks) * self.block_size + num_new_tokens
        num_new = -(-num_tokens // self.block_size) - len(blocks) - len(computed_blocks)
        if num_new <= 0 and blocks and not computed_blocks:
            return []  # the usual case: its last block has room
        # Found blocks that nobody holds stand in the free queue: they cannot be counted as room too.
        num_free = self.pool.num_free_blocks - (
            sum(block.ref_cnt == 0 for block in computed_blocks) if computed_blocks else 0)
        if num_new > num_free:
            return None
        if computed_blocks:
            self.pool.touch(computed_blocks)
        new_blocks = self.pool.get_new_blocks(num_new) if num_new > 0 else []
        if not blocks:  # it is being admitted
            blocks = self.req_to_blocks.setdefault(request.request_id, [])
            self.req_to_block_ids.setdefault(request.request_id, [])
            hashes = self.req_to_hashes.setdefault(request.request_id, [])
            hashes += [block.block_hash for block in computed_blocks]
        blocks += computed_blocks
        blocks += new_blocks
        block_ids = self.req_to_block_ids[request.request_id]
        block_ids += [block.block_id for block in blocks[len(block_ids):]]
        if self.events is not None:
            for kind, some in (("blocks_shared", computed_blocks), ("blocks_allocated", new_blocks)):
                if some:
                    self.events.emit(kind, request.request_id, [block.block_id for block in some])
        return new_blocks

    def has_room_for(self, request: Request, computed_blocks: list[KVCacheBlock]) -> bool:
        """Whether all tokens that a waiting request has would fit, beside those who run."""
        num_needed = -(-request.num_tokens // self.block_size) - len(computed_blocks)
        return num_needed <= self.pool.num_free_blocks - sum(block.ref_cnt == 0 for block in computed_blocks)

    def record_lookup(self, num_queried: int, num_hit: int) -> None:
        """Count an admission's look-up, in tokens (called once it is admitted, not at every attempt)."""
        self.prefix_cache_queries += num_queried
        self.prefix_cache_hits += num_hit

    def cache_full_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish the full blocks of the first num_computed_tokens. Only after the step ran: a hash promises written
        keys."""
        if not self.enable_caching or request.request_id in self._unpublished:
            return
        blocks = self.req_to_blocks[request.request_id]
        hashes = self.req_to_hashes[request.request_id]
        for i in range(len(hashes), num_computed_tokens // self.block_size):
            tokens = request.token_ids[i * self.block_size:(i + 1) * self.block_size]
            parent = hashes[-1] if hashes else NO_PARENT
            block_hash = self.pool.cache_full_block(blocks[i], parent, tokens)
            if block_hash is None:
                return
            hashes.append(block_hash)
            if self.events is not None and blocks[i].block_hash is not None:  # not if an equal one was there before
                self.events.emit("block_cached", request.request_id, blocks[i].block_id, i)

    def free(self, request: Request) -> None:
        """Let go of every block of a request that ended or was preempted. Its cached blocks stay findable."""
        self.pool.free_blocks(self.req_to_blocks.pop(request.request_id, []))
        block_ids = self.req_to_block_ids.pop(request.request_id, [])
        if block_ids and self.events is not None:
            self.events.emit("blocks_freed", request.request_id, block_ids)
        self.req_to_hashes.pop(request.request_id, None)
        self._unpublished.discard(request.request_id)

    def forget_cached(self) -> None:
        """The weights have changed: nothing computed so far may be found again, nor what running requests add to it."""
        self.pool.reset_cache()
        self._unpublished.update(self.req_to_blocks)

    def block_ids(self, request: Request) -> list[int]:
        """The block table of a request. The list is the manager's own and grows with the request: do not change it."""
        return self.req_to_block_ids.get(request.request_id, [])

    def check(self) -> None:
        """Raise AssertionError if a block is held by nobody it counts, or counted by nobody who holds it."""
        self.pool.check()
        counts = [0] * self.pool.num_blocks
        for blocks in self.req_to_blocks.values():
            for block in blocks:
                counts[block.block_id] += 1
        for block in self.pool.blocks:
            assert block.ref_cnt == counts[block.block_id], f"{block!r} is in {counts[block.block_id]} block tables"
