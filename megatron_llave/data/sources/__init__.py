"""Where pairs come from: one module per source, each turning raw material into shards and evaluation sets."""
