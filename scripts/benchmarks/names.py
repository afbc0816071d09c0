"""Names that options choose from: sizes of models and peers. It imports nothing, so that `--help` is there at once."""

PEERS = ("open_clip", "open_clip-strong", "clip", "vit_mae")
ARCHITECTURES = {
    "B/16": {"vision": (768, 12, 12), "text": (512, 12, 8), "patch": 16, "embed": 512},
    "L/16": {"vision": (1024, 24, 16), "text": (768, 12, 12), "patch": 16, "embed": 768},
    "L/14": {"vision": (1024, 24, 16), "text": (768, 12, 12), "patch": 14, "embed": 768},
    "H/14": {"vision": (1280, 32, 16), "text": (1024, 24, 16), "patch": 14, "embed": 1024},
}
