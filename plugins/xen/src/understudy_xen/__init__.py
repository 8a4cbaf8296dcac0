"""Xen for Understudy: the hypervisor, migration streams, and a xenstore client."""
