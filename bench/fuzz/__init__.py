"""A million random and mutated inputs for everything that reads bytes from disk: does all hold?

Each input is made from a seed and its number alone, and goes the way that bytes from disk go. A
file each has what mutates one kind of bytes and says what became of an input (`passed`: taken for
whole; `refused`: it ended in a documented error):

- frames: `Codec.decode`, of six specifications; for most, checksum and header are made right
  again, so that zstd is reached. Some decompress to gigabytes.
- manifests: `SavedContexts.manifest`, then whatever passes is opened and described.
- pieces: safetensors, through `SavedContexts.past`, `rest`, `describe` and `Store.context`.
- packs: packs, their directories, records and the store's format, through a `DiskTier`.
- trees: pages of an LMDB file: `fault_of`, `readable`; then it is opened, read and written.
- small: spec.json, graphs' sums, traces, and the chains of texts that manifests have.

A fault is: an error that is not documented, an error for what is unchanged, another value than was
written (where no checksum was made right again), a byte written where none belongs, a process that
dies, more than 2 s of the processor for one input, or more memory than 512 MiB beyond what the
process began with.

python -m bench.fuzz --inputs 1000000 --seed 0
"""
