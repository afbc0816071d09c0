"""The command line of every script: options and ranges, parsers with one-line errors, files that options name."""
