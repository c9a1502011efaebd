"""What a loss of power may take of a kept store. Owns the names; light to import."""

DURABILITIES = {
    "sync": "what a save has acknowledged survives a loss of power",
    "async": "a loss of power may take the last save, whole, and nothing before it",
    "none": "a loss of power may take everything: for scratch",
}
"""Each with what it promises. A process that is killed loses nothing by any of them."""
