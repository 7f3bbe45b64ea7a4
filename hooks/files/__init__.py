"""Bytes on disk, none of them trusted: weight files, their headers, folders and links, the hub's cache, what is written."""
