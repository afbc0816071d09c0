"""Publishes a model folder: model, processor, code, card, recipe, curves, logs and results; private unless asked.

    flip-hf push runs/shapes you/flip-shapes                       # again: only what has changed
    flip-hf push runs/shapes you/flip-shapes --dry_run to_upload   # no network: a folder to look at
    flip-hf push runs/tuned you/clip-tuned --export_clip --public  # a stock CLIPModel, for everyone

FOLDER is what `flip-hf pretrain` or `flip-hf convert` left, or a checkpoint. Log in with `hf auth
login`, or set HF_TOKEN.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from flip_hf.console.endings import end_with
from flip_hf.console.parsers import ScriptParser
from flip_hf.redaction import install


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="model folder")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub, or the name of one of your own")
    parser.add_argument(
        "--public", action="store_true", help="for everyone to see; a private repository becomes public"
    )
    parser.add_argument("--export_clip", action="store_true", help="publish a stock CLIPModel, where it can be one")
    parser.add_argument("--license", help="identifier of the weights' licence, for the card: apache-2.0, cc-by-nc-4.0")
    parser.add_argument("--dry_run", metavar="OUT", type=Path, help="make the folder to upload, and stop there")
    return parser


def main(argv: Sequence[str]) -> None:
    """Prepares a complete folder, and uploads it; a mistake ends in one line."""
    install()
    options = make_parser().parse_args(argv)
    publish(options)


def publish(options: argparse.Namespace) -> None:
    """Makes the folder, and uploads it unless that is not wanted."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    from flip_hf.hub.folder import FolderError, prepare, scratch_beside
    from flip_hf.hub.push import HubError, HubUnreachable, create, push

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    asked = {"license": options.license, "export_clip": options.export_clip}
    try:
        if options.dry_run is not None:
            prepare(options.folder, options.dry_run, repo_id=options.repo_id, **asked)
            size = sum(path.stat().st_size for path in options.dry_run.rglob("*") if path.is_file())
            print(f"{options.dry_run}: complete, {size / 1e6:,.1f} MB; `hf upload {options.repo_id} {options.dry_run}`")
            return
        repo_id = create(options.repo_id, private=not options.public)  # first: what it refuses, it refuses at once
        with scratch_beside(options.folder) as scratch:
            folder = prepare(options.folder, scratch / "ready", repo_id=repo_id, link=True, **asked)
            print(push(folder, repo_id, private=not options.public))
    except HubUnreachable as error:
        end_with(f"{error} The same command resumes the push; --dry_run OUT makes the folder without the network.")
    except (FolderError, HubError) as error:
        end_with(error)
