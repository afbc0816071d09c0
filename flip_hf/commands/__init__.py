"""The console command `flip-hf`: a module a subcommand, each with a `main` that takes the words behind its name."""
