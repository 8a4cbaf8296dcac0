"""The daemon of one host: it runs the sessions of this host's guests and answers the command line."""
