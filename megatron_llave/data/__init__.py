"""From raw pairs to packed micro-batches: shards on disk, evaluation sets, and the sources they are made from."""
