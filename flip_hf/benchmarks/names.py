"""Names that options choose from: sizes of models and peers. It imports nothing, so that `--help` is there at once."""

PEERS = ("open_clip", "open_clip-strong", "clip", "vit_mae")
# Width, blocks and heads of the two towers, patch side, shared embedding (the paper's Table 9; the first two are for
# trials on a CPU).
ARCHITECTURES = {
    "tiny/32": {"vision": (64, 2, 2), "text": (64, 2, 2), "patch": 32, "embed": 64},
    "small/16": {"vision": (384, 6, 6), "text": (256, 4, 4), "patch": 16, "embed": 256},
    "B/16": {"vision": (768, 12, 12), "text": (512, 12, 8), "patch": 16, "embed": 512},
    "L/16": {"vision": (1024, 24, 16), "text": (768, 12, 12), "patch": 16, "embed": 768},
    "L/14": {"vision": (1024, 24, 16), "text": (768, 12, 12), "patch": 14, "embed": 768},
    "H/14": {"vision": (1280, 32, 16), "text": (1024, 24, 16), "patch": 14, "embed": 1024},
}
