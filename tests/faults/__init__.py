"""The fault laboratory: a server and a proxy on loopback that break what they are told to break, and count charges."""
