"""A guest, a laboratory of two hosts and a client, to show and to test protection for real."""
