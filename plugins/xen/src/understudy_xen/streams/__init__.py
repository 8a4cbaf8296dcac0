"""Migration streams of Xen: framing, verification, reading and writing, without any input or output of its own."""
