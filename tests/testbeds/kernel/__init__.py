"""The kernel bed: a real Linux kernel in an ordinary process, booted in two seconds, without root and without KVM.

The kernel is Debian's package user-mode-linux. Its root is the host's root, read-only, under an overlay in memory;
one run directory is shared read-write at the same path on both sides. The guest's root user is whoever started it
outside. ``python -m tests.testbeds.kernel -- COMMAND`` runs one command there; `machine` boots and kills, `plugin`
runs tests marked ``kernel`` there, `host` has commands run by an agent inside, `pair` joins two of them.
"""
