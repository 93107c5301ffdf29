"""Pictures as shards hold them: no larger than training needs, and else as they came."""

import io
import os

import numpy as np
from PIL import Image

from mplug_jax.data.decoding import Picture, read_picture
from mplug_jax.data.files import place
from mplug_jax.data.records import BadSample


def packed_picture(
    image: Picture, max_side: int, quality: int
) -> tuple[bytes | np.ndarray, np.ndarray]:
    """What a shard holds of a picture, and its pixels.

    One whose longer side has more than `max_side` pixels is turned upright, resized to that
    (bicubic, antialiased) and encoded as JPEG of that quality; one that has not stays the file it
    was, or the array. Each is decoded once, which is how the unusable ones are found.

    Raises:
      BadSample: as `decode_image`.
    """
    content = image
    if not isinstance(image, bytes | np.ndarray):
        try:
            content = place(image).read_bytes()
        except OSError as error:
            raise BadSample(f"{os.fspath(image)}: cannot be read: {error.strerror}") from error
    try:
        picture = read_picture(content)
    except BadSample:
        picture = read_picture(image)  # raises the same, with the file's name where it has one
    longer = max(picture.size)
    if longer > max_side:
        size = [max(1, round(side * max_side / longer)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        content = file.getvalue()
    return content, np.asarray(picture)
