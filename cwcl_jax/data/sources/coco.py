"""COCO captions as a source: `coco:/data/annotations/captions_val2017.json?images=/data/val2017`.

Reads the annotation file of the COCO captions release. The usual protocol takes the first five
captions of every picture (some have six or seven); `captions=0` takes all.
"""

from typing import Any

from cwcl_jax.data.sources.base import Source
from cwcl_jax.data.sources.files import require, require_file
from cwcl_jax.data.sources.tables import table_of_rows
from cwcl_jax.files import parse_json
from cwcl_jax.paths import to_path


def open_coco(path: str, *, images: str = "", captions: int = 5) -> Source:
    """Returns the pictures in the order of the file, each with its captions.

    Pictures without captions are left out.

    Args:
      path: the annotation file, `captions_val2017.json` or similar.
      images: the folder of pictures; by default the folder next to `annotations` with its name.
      captions: maximal number of captions of a picture, the first ones; 0 = all.
    """
    file = require_file(path, "The COCO captions file")
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not a COCO captions file: {error}.") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(
            f"{file} is not a COCO captions file: it lacks the lists 'images' and 'annotations'."
        )
    by_image: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise ValueError(
                f"{file}: an annotation has no 'caption'; name a captions_*.json file."
            )
        by_image.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    rows = [
        {
            "id": str(image["id"]),
            "image": image["file_name"],
            "text": by_image[image["id"]][: captions or None],
        }
        for image in content["images"]
        if image["id"] in by_image
    ]
    folder = to_path(images) if images else file.parent.parent / file.stem.removeprefix("captions_")
    root = require(folder, "The folder of COCO's pictures (option images=)")
    return table_of_rows(rows, {"image": "image", "text": "text"}, root)
