"""A gate in the kernel for the output of a guest: the NIC subkind ``netbuffer``."""
