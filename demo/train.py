"""Train the demo model from nothing: `python -m demo.train` (all stages), or the names of some stages.

    encoder (with its speech) -> pictures -> vae -> unet -> export

Each stage counts its steps, starts from fixed seeds, and resumes where it was stopped; its files are in
demo/build.
Needs the Debian packages espeak-ng, libespeak-ng1 and flite.
"""

from __future__ import annotations

from demo import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped arguments are answered at once.
    arguments.train(__doc__)

import platform
import sys

import diffusers
import torch
import transformers

from demo import encoder, pictures, unet, vae
from demo.export import export
from demo.stages import BUILD

ENCODER_STEPS, VAE_STEPS, UNET_STEPS, PIXEL_STEPS = 4000, 1800, 2400, 300


def main() -> int:
    """The command line; returns the exit status."""
    given = arguments.train(__doc__)
    stages = given.stages
    torch.set_num_threads(given.threads)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"transformers {transformers.__version__}, {given.threads} threads"
    )
    if "encoder" in stages:
        encoder.save_trained(encoder.run(ENCODER_STEPS), BUILD / "listener.pt")
    if "pictures" in stages:
        pictures.pictures()
    if "vae" in stages:
        vae.run(VAE_STEPS)
    if "unet" in stages or "export" in stages:
        listener = unet.load_listener()
        unet.standardise(listener)
        seen = vae.run(VAE_STEPS)
        vae.freeze(seen)
        spoken = unet.run(seen, listener, UNET_STEPS, pixel_steps=PIXEL_STEPS)
        if "export" in stages:
            export(listener.encoder, seen, spoken)
    return 0


if __name__ == "__main__":
    sys.exit(main())
