"""Search in one's own images by text, by image or by both: the index, queries, and a local web page."""
