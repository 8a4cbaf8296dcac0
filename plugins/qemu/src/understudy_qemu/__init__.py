"""QEMU for Understudy: the hypervisor, block replication for disks, filter-buffer for interfaces, and the demo."""
