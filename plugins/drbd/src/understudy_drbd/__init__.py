"""Disks on DRBD, rolled back to the last checkpoint by dm-thin, for Understudy."""
