"""The Xen bed: Debian's Xen with a Debian dom0 under QEMU's TCG, without KVM, one host or two, booted in ten seconds.

`image` builds what a host boots from, once, with what apt offers; `checkout` packs this checkout and its ``.venv``,
which dom0 sees at the same path. `machine` boots and kills, `host` has commands run by an agent in dom0, `pair` joins
two hosts and a client by a network, `guests` are what runs in the hosts. ``python -m tests.testbeds.xen -- COMMAND``
runs one command in a fresh dom0.
"""
