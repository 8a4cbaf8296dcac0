"""Output comparison of QEMU's COLO for Understudy: the NIC subkind ``colo-proxy``."""
