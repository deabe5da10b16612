"""KVBlockMap: the physical KV-cache blocks, who holds them, how full they are, what is shared and what is wasted."""

from widgets.panel import Panel


class KVBlockMap(Panel, script=("blocks_model.js", "blocks_draw.js", "kv_block_map.js")):
    """The pool as a grid, the selected request's block table above it, and every request's use of memory beside it.

        KVBlockMap(live, height=360)

    A cell is a block: its colour is its owner's (stripes: several owners share it, and the number is how many), filled
    from the left as far as its slots hold keys. Hatched: nobody holds it, but the prefix cache finds it again.
    Click a block to see its tokens; select a request to follow its table into the pool, and to kill it.
    Keys, while the map has the focus: arrows move from block to block, Enter opens one, Esc closes it.
    """
