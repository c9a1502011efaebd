"""What can be asked of a store for what it keeps. Owns the names; light to import."""

DURABILITIES = {
    "sync": "what a save has acknowledged survives a loss of power",
    "async": "a loss of power may take the last save, whole, and nothing before it",
    "none": "a loss of power may take everything: for scratch",
}
"""Each with what it promises. A process that is killed loses nothing by any of them."""

PRECISIONS = {
    "exact": "blocks come back from disk bit for bit",
    "int8": "in 8 bits a number, rounded",
    "int4": "in 4 bits a number, rounded more",
}
"""Of blocks on disk. All are compressed, checksummed and verified alike."""
