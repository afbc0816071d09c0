"""The command line of every script: options and their ranges, parsers that answer in one line, files that are named."""
