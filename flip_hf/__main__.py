"""Runs the console command as `python -m flip_hf`, which launchers of several processes can start."""

from flip_hf.commands.main import main

if __name__ == "__main__":
    main()
